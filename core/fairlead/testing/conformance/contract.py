"""Tier 1: registration, probe, data and memory. What every other tier builds on."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fairlead import contract
from fairlead.errors import ConfigError, PluginContractError
from fairlead.interface import (
    TAGS,
    AttentionShape,
    AttentionSpec,
    Device,
)
from fairlead.ops.table import OP_NAMES, REFERENCE
from fairlead.testing.conformance import parts
from fairlead.testing.conformance.check import Check, Outcome
from fairlead.testing.conformance.registration import imports_torch
from fairlead.testing.conformance.subject import Subject

ABSURD_BYTES = 2**60


def checks(subject: Subject) -> Iterator[Check]:
    """The checks of the tier."""
    first: list[tuple[str, str, Callable[[Subject], None]]] = [
        ("registration imports no torch", "fairlead_platforms", registration),
        ("probe repeats itself", "probe", probe),
        ("create", "create", create),
    ]
    then: list[tuple[str, str, Callable[[Subject], None]]] = [
        ("capabilities", "capabilities", capabilities),
        ("defaults", "defaults", defaults),
        ("memory report", "memory_info", memory_info),
        ("synchronize", "synchronize", synchronize),
        ("data types on the device", "torch_device", data_types),
        ("allocator: tensors and accounts", "allocator.empty", allocator),
        ("allocator: refusal", "allocator.empty", allocator_refusal),
        ("op providers", "ops", op_providers),
        ("attention backends", "attention_backends", attention_backends),
        ("attention: block sizes in bytes", "attention", block_bytes),
        ("two instances", "create", two_instances),
        *parts.CHECKS,
    ]
    for name, hook, look in [*first, *(then if subject.is_created else ())]:
        yield Check(tier="contract", name=name, hook=hook, run=_outcome(look, subject))


def _outcome(look: Callable[[Subject], None], subject: Subject) -> Callable[[], Outcome]:
    def run() -> Outcome:
        look(subject)
        return Outcome()

    return run


def registration(s: Subject) -> None:
    """A process of its own lists the plugin, and has no torch then."""
    is_light = not imports_torch(s.record.distribution)
    s.expect(is_light, "fairlead_platforms", "registration and probe without torch", "torch was imported")


def probe(s: Subject) -> None:
    assert s.record.spec is not None
    again = s.record.spec.probe()
    names = [device.name for device in s.record.devices]
    s.expect(len(set(names)) == len(names), "probe", "devices of different names", names)
    is_same = isinstance(again, tuple) and [d.name for d in again if isinstance(d, Device)] == names
    s.expect(is_same, "probe", f"the devices of the first call again: {names}", again)
    complaints = s.record.spec.diagnose()
    is_texts = isinstance(complaints, tuple) and all(isinstance(text, str) for text in complaints)
    s.expect(is_texts, "diagnose", "a tuple of sentences", repr(complaints))


def create(s: Subject) -> None:
    """What the core itself looks at, and where its tensors are to live."""
    p = s.platform
    s.expect(isinstance(p.torch_device, torch.device), "torch_device", "a torch.device", type(p.torch_device).__name__)


def capabilities(s: Subject) -> None:
    c = s.platform.capabilities
    s.expect(s.platform.capabilities == c, "capabilities", "the same record each time", s.platform.capabilities)
    for dtype in c.dtypes:
        known = isinstance(getattr(torch, str(dtype), None), torch.dtype)
        s.expect(known, "capabilities.dtypes", 'names of torch dtypes such as "float32"', repr(dtype))
    for field in ("dtypes", "block_sizes", "head_sizes", "kv_layouts", "kv_dtypes", "quantization"):
        values = getattr(c, field)
        is_set = isinstance(values, tuple) and len(set(values)) == len(values)
        s.expect(is_set, f"capabilities.{field}", "a tuple without repetition", repr(values))
    for field in ("block_sizes", "head_sizes"):
        values = getattr(c, field)
        positive = all(type(v) is int and v > 0 for v in values)
        s.expect(positive, f"capabilities.{field}", "integers above 0", repr(values))


def defaults(s: Subject) -> None:
    c, d = s.platform.capabilities, s.platform.defaults
    share = d.device_memory_utilization
    s.expect(0 < share <= 1, "defaults.device_memory_utilization", "a share in (0, 1]", share)
    most = c.max_batched_tokens or d.max_num_batched_tokens
    tokens = d.max_num_batched_tokens
    s.expect(0 < tokens <= most, "defaults.max_num_batched_tokens", f"1 to capabilities' {most}", tokens)


def memory_info(s: Subject) -> None:
    """Twice, with an allocation between them: a neighbour may change what is free, so only bounds are checked."""
    for _ in range(2):
        total = contract.memory_info(s.platform).total_bytes
        most = s.device.memory_bytes
        expected = f"a total of at most the device's {most} bytes, as its probe said"
        s.expect(total <= most * 1.01, "memory_info", expected, total)
        s.platform.allocator.empty((1024,), torch.uint8, tag="weights")


def synchronize(s: Subject) -> None:
    for _ in range(2):
        s.platform.synchronize()


def data_types(s: Subject) -> None:
    """Values survive the way to the device and back."""
    for dtype in s.dtypes:
        there = torch.arange(-8, 9, dtype=torch.float32).to(getattr(torch, dtype))
        back = s.to_host(s.to_device(there))
        s.expect(torch.equal(there, back), "torch_device", f"{dtype} values back as they went", back.tolist())
    integers = torch.tensor([0, 1, 2**40], dtype=torch.int64)
    back = s.to_host(s.to_device(integers))
    s.expect(torch.equal(integers, back), "torch_device", "int64 values back as they went", back.tolist())


def allocator(s: Subject) -> None:
    a = s.platform.allocator
    for tag in TAGS:
        other = TAGS[1 - TAGS.index(tag)]
        for dtype_name in s.dtypes:
            dtype: torch.dtype = getattr(torch, dtype_name)
            before, others = a.allocated_bytes(tag), a.allocated_bytes(other)
            s.expect(before >= 0, "allocator.allocated_bytes", "0 or more", before)
            like = torch.empty((5, 3, 64), dtype=dtype)
            made = a.empty((5, 3, 64), dtype, tag=tag)
            tensor = s.check_tensor("allocator.empty", made, like, f"the tag {tag!r}")
            s.expect(tensor.is_contiguous(), "allocator.empty", "a contiguous tensor", tensor.stride())
            held = a.allocated_bytes(tag) - before
            s.expect(held >= like.nbytes, "allocator.allocated_bytes", f"at least {like.nbytes} more for {tag!r}", held)
            s.expect(
                a.allocated_bytes(other) == others, "allocator.allocated_bytes", f"{other!r} untouched", "a change"
            )
            tensor.fill_(2)
            is_kept = bool((s.to_host(tensor).float() == 2).all())
            s.expect(is_kept, "allocator.empty", "a tensor that keeps what is written", "other values")
            del made, tensor
            left = a.allocated_bytes(tag) - before
            s.expect(
                left == 0, "allocator.allocated_bytes", f"{tag!r} as before once the tensor is gone", f"{left} more"
            )
    s.check_tensor("allocator.empty", a.empty((0, 4), torch.float32, tag="weights"), torch.empty(0, 4), "no element")


def allocator_refusal(s: Subject) -> None:
    try:
        got: object = s.platform.allocator.empty((ABSURD_BYTES,), torch.uint8, tag="kv_cache")
    except MemoryError:
        return
    except Exception as error:
        got = type(error).__name__
    s.fail("allocator.empty", f"MemoryError for {ABSURD_BYTES} bytes", got)


def op_providers(s: Subject) -> None:
    for op, providers in s.platform.ops().items():
        s.expect(op in OP_NAMES, "ops", f"op names among {', '.join(OP_NAMES)}", repr(op))
        hook = f"ops[{op!r}]"
        names = [p.name for p in providers]
        s.expect(len({*names, REFERENCE}) == len(names) + 1, hook, f"names that differ, none {REFERENCE!r}", names)
        for provider in providers:
            for dtype in s.dtypes:
                reason = provider.refuses(dtype)
                is_reason = reason is None or (isinstance(reason, str) and bool(reason))
                s.expect(is_reason, f"{hook} {provider.name!r}.refuses", "None or a reason", repr(reason))


def attention_backends(s: Subject) -> None:
    names = s.platform.attention_backends()
    s.expect(len(set(names)) == len(names), "attention_backends", "names that differ", names)
    for name in names:
        before = s.platform.allocator.allocated_bytes("kv_cache")
        backend = s.platform.attention(name, small_shape(s))
        contract.check_backend(s.name, name, backend)
        s.expect(backend.name == name, f"attention({name!r})", f"a backend named {name!r}", repr(backend.name))
        more = s.platform.allocator.allocated_bytes("kv_cache") - before
        s.expect(more == 0, f"attention({name!r})", "no memory taken yet", f"{more} bytes")
    try:
        got: object = s.platform.attention("no such backend", small_shape(s))
    except (ConfigError, PluginContractError):
        return
    except Exception as error:
        got = type(error).__name__
    s.fail("attention", "ConfigError for a name that there is not", got)


def block_bytes(s: Subject) -> None:
    """The cache is sized by `block_bytes`: it must not take more than that."""
    num_blocks = 7
    for name in s.platform.attention_backends():
        backend = s.platform.attention(name, small_shape(s))
        contract.check_backend(s.name, name, backend)
        size = backend.block_bytes()
        before = s.platform.allocator.allocated_bytes("kv_cache")
        caches: Any = backend.allocate(num_blocks)
        hook = f"attention({name!r}).allocate"
        got = f"{len(caches)}" if isinstance(caches, list) else type(caches).__name__
        s.expect(got == "2", hook, "a list of 2 caches, one per layer", got)
        taken = s.platform.allocator.allocated_bytes("kv_cache") - before
        expected = f"at most {num_blocks} blocks of {size} bytes under the tag 'kv_cache', and more than none"
        s.expect(0 < taken <= num_blocks * size, hook, expected, f"{taken} bytes")
        del caches
        left = s.platform.allocator.allocated_bytes("kv_cache") - before
        s.expect(left == 0, hook, "memory that is free once the caches are gone", f"{left} bytes still held")


def two_instances(s: Subject) -> None:
    assert s.record.spec is not None
    other = s.record.spec.create(s.device)
    before = other.allocator.allocated_bytes("weights")
    kept = s.platform.allocator.empty((64,), torch.float32, tag="weights")
    more = other.allocator.allocated_bytes("weights") - before
    s.expect(more == 0, "create", "instances with accounts of their own", f"{more} bytes of another's {kept.nbytes}")


def small_shape(s: Subject) -> AttentionShape:
    """Two layers of a head size that the platform has, in its default dtype and block size."""
    sizes = s.platform.capabilities.head_sizes
    head_size = 64 if not sizes or 64 in sizes else sizes[0]
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=head_size, scale=head_size**-0.5)
    d = s.platform.defaults
    return AttentionShape(spec=spec, num_layers=2, block_size=d.block_size, dtype=d.dtype)
