"""A platform without a fault, and parts with one each: what wrong_plugins.py is made of."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fairlead.errors import ConfigError
from fairlead.interface import (
    AttentionBackend,
    AttentionMetadata,
    AttentionShape,
    Device,
    LinearMethod,
    LinearShape,
    MemoryInfo,
    OpProvider,
    Platform,
)
from fairlead.ops import reference
from fairlead.ops.attention import ReferenceAttention
from fairlead.ops.graph import PassThrough, smallest_bucket
from fairlead.ops.linear import Int8Linear, PlainLinear
from fairlead.ops.platform import EagerStream, SingleRank
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.platform import CpuPlatform

DEVICE = Device(name="right:0", description="host memory", memory_bytes=2**40)
STEP = 5  # faults of a step come in this one: not while the engine is built
Tensor = torch.Tensor


class Right(CpuPlatform):
    """No fault: the CPU with the reference of all ops and of attention."""

    backend: type[ReferenceAttention] = ReferenceAttention
    own_ops: Mapping[str, Callable[..., Any]] = {}
    own_methods: Mapping[str, tuple[LinearMethod, ...]] = {}

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.name = "right"
        self.capabilities = replace(
            self.capabilities,
            dtypes=("float32",),
            block_sizes=(16, 8),
            kv_layouts=("slots",),
            kv_dtypes=("auto",),
            quantization=tuple(scheme for scheme in self.own_methods if scheme != "unquantized"),
            batch_invariant=False,
        )
        self.defaults = replace(self.defaults, dtype="float32")

    def attention_backends(self) -> tuple[str, ...]:
        return ("reference",)

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        if name != "reference":
            raise ConfigError(f"there is no attention backend {name!r}")
        return self.backend(shape, self.allocator, self.torch_device)

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        return {op: (OpProvider(name="own", fn=fn),) for op, fn in self.own_ops.items()}

    def linear_methods(self) -> Mapping[str, tuple[LinearMethod, ...]]:
        return self.own_methods


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """How the kit is to convict a platform: in which tier (`check` of it), naming which hook, having got what."""

    tier: str
    hook: str
    got: str
    check: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    create: Callable[[Device], Any] | None = None
    probe: Callable[[], Any] = lambda: (DEVICE,)


def made(name: str, changes: Mapping[str, Any], device: Device) -> Platform:
    """Right, with some members replaced."""
    platform = Right(device)
    platform.name = name
    for member, value in changes.items():
        setattr(platform, member, value(platform) if getattr(value, "of_platform", False) else value)
    return platform


def of_platform(value: Callable[[Right], Any]) -> Callable[[Right], Any]:
    """Marks a change that is made from the platform."""
    value.of_platform = True  # type: ignore[attr-defined]
    return value


def capable(**changes: Any) -> Mapping[str, Any]:
    return {"capabilities": of_platform(lambda p: replace(p.capabilities, **changes))}


def default(**changes: Any) -> Mapping[str, Any]:
    return {"defaults": of_platform(lambda p: replace(p.defaults, **changes))}


def memory(total: Any, free: Any) -> Mapping[str, Any]:
    return {"memory_info": lambda: MemoryInfo(total_bytes=total, free_bytes=free)}


def op(name: str, fn: Callable[..., Any], **more: Any) -> Mapping[str, Any]:
    return {"own_ops": {name: fn}, **more}


def attending(**members: Any) -> Mapping[str, Any]:
    """A reference attention with some methods replaced."""
    return {"backend": type("WrongAttention", (ReferenceAttention,), {"__module__": __name__, **members})}


class WrongAllocator(HostAllocator):
    """Host memory with a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.kept = fault, []  # type: ignore[var-annotated]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, *, tag: str) -> Any:
        if self.fault == "none":
            return None
        if self.fault == "dtype":
            return super().empty(shape, torch.float64, tag=tag)
        if self.fault == "shape":
            return super().empty((*shape, 1), dtype, tag=tag)
        if self.fault == "error" and shape[0] > 2**40:
            raise RuntimeError("out of memory")
        tensor = super().empty(shape, dtype, tag=tag)
        if self.fault == "leak":
            self.kept.append(tensor)
        return tensor

    def allocated_bytes(self, tag: str) -> int:
        return super().allocated_bytes("weights" if self.fault == "tag" else tag)

    def offload(self, tag: str) -> None:
        if self.fault != "stays":
            super().offload(tag)

    def _keep(self, contents: Tensor) -> Callable[[Tensor], None]:
        fill = super()._keep(contents)
        return (lambda memory: None) if self.fault == "forgets" else fill


class WrongRunner(PassThrough):
    """Has buckets, and a fault."""

    buckets = (8, 16)

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.first: dict[int, Tensor] = {}

    def bucket(self, num_tokens: int, max_query_len: int) -> int | None:
        return 8 if self.fault == "small" else smallest_bucket(self.buckets, num_tokens)

    def run(self, forward: Any, token_ids_T: Tensor, positions_T: Tensor, step: object) -> Tensor:
        """Reads the token ids of the capture when it replays."""
        ids = self.first.setdefault(len(token_ids_T), token_ids_T)
        return super().run(forward, ids, positions_T, step)


class WrongRank(SingleRank):
    """Adds up nobody."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor * 0


class WrongStream(EagerStream):
    """Its events are never done."""

    def query(self) -> bool:
        return False


def allocating(fault: str) -> Mapping[str, Any]:
    return {"allocator": of_platform(lambda p: WrongAllocator(fault))}


def spoiling(fn: Callable[..., Any], spoil: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """The op with a spoilt result."""
    return lambda *args: spoil(fn(*args))


def in_place_rms_norm(x_NE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    result = reference.rms_norm(x_NE, weight_E, eps)
    x_NE.mul_(2)
    return result


def norm_of_dense_rows(x_NE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """Walks the memory as though rows followed each other."""
    return reference.rms_norm(x_NE.as_strided(x_NE.shape, (x_NE.shape[-1], 1)), weight_E, eps)


def norm_over_the_batch(x_NE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(x_NE, weight_E, eps) + 0 * x_NE.sum()


def norm_by_batch_size(x_NE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    return reference.rms_norm(x_NE, weight_E, eps) * (1 + 1e-6 * (len(x_NE) > 1))


def norm_of_some(x_NE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    if not len(x_NE):
        raise ValueError("no rows")
    return reference.rms_norm(x_NE, weight_E, eps)


def raise_bad(*args: object) -> Any:
    raise OSError("the device\nis on fire")


def plain_cache(backend: Any, shape: AttentionShape, *rest: Any) -> None:
    ReferenceAttention.__init__(backend, replace(shape, kv_dtype="auto"), *rest)


def changed_spec(self: ReferenceAttention, shape: AttentionShape, *rest: Any, **changes: Any) -> None:
    ReferenceAttention.__init__(self, shape, *rest)
    self.spec = replace(shape.spec, **changes)


def refusing(self: ReferenceAttention, shape: AttentionShape, *rest: Any, **refused: int) -> None:
    """Cannot do what the capabilities say it can."""
    for name, value in refused.items():
        if value in (getattr(shape, name, None), getattr(shape.spec, name, None)):
            raise ValueError(f"{name} {value} is not implemented")
    ReferenceAttention.__init__(self, shape, *rest)


def interleaved_heads(self: ReferenceAttention, q: Tensor, k: Tensor, v: Tensor, cache: Any, plan: object) -> Tensor:
    """Query head h takes kv-head h modulo K, in place of h divided by the size of a group."""
    groups = self.spec.num_heads // self.spec.num_kv_heads
    order = torch.arange(q.shape[1]).view(groups, -1).t().flatten()
    out = ReferenceAttention.forward(self, q[:, order], k, v, cache, plan)
    return out[:, order.argsort()]


def wrapped_forward(
    before: Callable[..., None] = lambda *a: None, after: Callable[[Tensor], Any] = lambda out: out
) -> Any:
    def forward(self: ReferenceAttention, q: Tensor, k: Tensor, v: Tensor, cache: Any, plan: object) -> Any:
        before(q, k, v, cache, plan)
        return after(ReferenceAttention.forward(self, q, k, v, cache, plan))

    return forward


def late_write(self: ReferenceAttention, q: Tensor, k: Tensor, v: Tensor, cache: Any, plan: Any) -> Tensor:
    """Reads before it writes: no token sees itself."""
    out = reference.paged_attention(
        q, cache.k, cache.v, plan.query_lens_S, plan.seq_lens_S, plan.block_tables_SB, self.shape.block_size, self.spec
    )
    ReferenceAttention.forward(self, q, k, v, cache, plan)
    return out


def whole_blocks(self: ReferenceAttention, q: Tensor, k: Tensor, v: Tensor, cache: Any, plan: Any) -> Tensor:
    """Reads all of the last block, and gives what lies behind the context a weight of 0: 0 times NaN is NaN."""
    out = ReferenceAttention.forward(self, q, k, v, cache, plan)
    size = self.shape.block_size
    last = [int(plan.block_tables_SB[i, (n - 1) // size]) for i, n in enumerate(plan.seq_lens_S)]
    starts = [sum(plan.query_lens_S[:i]) for i in range(len(last))]
    for start, num_queries, block in zip(starts, plan.query_lens_S, last, strict=True):
        out[start : start + num_queries] += 0 * cache.v[block * size : (block + 1) * size].sum()
    return out


def scribbling_plan(self: ReferenceAttention, metadata: AttentionMetadata) -> object:
    plan = ReferenceAttention.plan(self, metadata)
    metadata.block_tables_SB[:] = 0
    return plan


def copy_at_once(self: ReferenceAttention, kv_caches: Sequence[Any], pairs: Sequence[tuple[int, int]]) -> None:
    """All reads before all writes: a copy of a copy is stale."""
    ReferenceAttention.copy_blocks(self, kv_caches, list(reversed(pairs)))


def attending_from_step(fault: Callable[[Tensor], Tensor]) -> Mapping[str, Any]:
    """Attention that goes wrong in step STEP of an engine (it counts plans)."""

    def plan(self: Any, metadata: AttentionMetadata) -> object:
        self.num_steps = getattr(self, "num_steps", 0) + 1
        return ReferenceAttention.plan(self, metadata)

    def forward(self: Any, *args: Any) -> Tensor:
        out = ReferenceAttention.forward(self, *args)
        return fault(out) if self.num_steps == STEP else out

    return attending(plan=plan, forward=forward)


def fail_in_step(out: Tensor) -> Tensor:
    raise RuntimeError("the device fell off the bus")


def nan_in_step(out: Tensor) -> Tensor:
    return out * torch.nan


def hang() -> None:
    time.sleep(3600)


def die_in_step(out: Tensor) -> Tensor:
    os._exit(3)


_caches: list[Any] = []


def kept_caches(self: ReferenceAttention, num_blocks: int) -> list[Any]:
    _caches.append(ReferenceAttention.allocate(self, num_blocks))
    return list(_caches[-1])


_shared: dict[Any, list[Any]] = {}


def shared_caches(self: ReferenceAttention, num_blocks: int) -> list[Any]:
    """One cache for all engines of one shape."""
    key = (self.shape, num_blocks)
    if key not in _shared:
        _shared[key] = ReferenceAttention.allocate(self, num_blocks)
    return _shared[key]


class WrongLinear(Int8Linear):
    """The int8 reference with a fault."""

    name = "own"

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def packed_bytes(self, shape: LinearShape) -> int:
        return 0 if self.fault == "bytes" else super().packed_bytes(shape)

    def pack(self, tensors: Mapping[str, Tensor]) -> object:
        return super().pack({"weight": tensors["weight"] * (1.1 if self.fault == "weight" else 1)})

    def apply(self, x_NI: Tensor, packed: object, bias_O: Tensor | None) -> Any:
        out = super().apply(x_NI, packed, None if self.fault == "bias" else bias_O)
        return None if self.fault == "none" else out.double() if self.fault == "dtype" else out


def linear(fault: str) -> Mapping[str, Any]:
    return {"own_methods": {"int8": (WrongLinear(fault),)}, **capable(quantization=("int8",))}


class WrongFusion(PlainLinear):
    """The unquantised reference that also does what follows, with a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(reference.linear, "own")
        self.fault = fault

    def refuses_fused(self, shape: LinearShape, activation: str | None) -> Any:
        refused = activation not in (None, "silu_and_mul")
        return ("" if self.fault == "reason" else "it is not implemented") if refused else None

    def pack_fused(self, tensors: Mapping[str, Tensor], activation: str) -> object:
        weight = tensors["weight"]
        return (weight.flip(0) if self.fault == "weight" else weight,)

    def dequantise(self, packed: object) -> Tensor:
        return super().dequantise(packed[0] if isinstance(packed, tuple) else packed)

    def apply_fused(self, x_NI: Tensor, packed: Any, bias_O: Tensor | None, residual: Tensor | None = None) -> Any:
        out = reference.linear(x_NI, packed[0] if isinstance(packed, tuple) else packed, bias_O)
        if isinstance(packed, tuple) and self.fault != "activation":
            gate, up = out.chunk(2, dim=1)
            out = reference.silu_and_mul(torch.cat((up, gate), dim=1) if self.fault == "order" else out)
        if residual is not None and self.fault != "residual":
            out = residual.add_(out) if self.fault == "in place" else residual + out
        return out * (1 + 1e-6 * (len(out) > 1)) if self.fault == "batch" else out


def fusing(fault: str, **more: Any) -> Mapping[str, Any]:
    return {"own_methods": {"unquantized": (WrongFusion(fault),)}, **more}


class WrongExperts(PlainLinear):
    """The unquantised reference that also runs experts, with a fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(reference.linear, "own")
        self.fault = fault

    def refuses_experts(self, enter: LinearShape, leave: LinearShape, spec: Any) -> str | None:
        return "" if self.fault == "reason" else None

    def pack_experts(self, tensors: Mapping[str, Tensor], spec: Any) -> object:
        return tensors["gate_up"], tensors["down"], spec

    def apply_experts(self, x_TE: Tensor, logits: Tensor, correction: Tensor | None, packed: Any) -> Any:
        gate_up, down, spec = packed
        if self.fault == "weights":
            spec = replace(spec, normalize=False)
        chosen = None if self.fault == "correction" else correction
        out = reference.moe(x_TE, logits, chosen, gate_up, down, spec)
        return out * (1 + 1e-6 * (len(out) > 1)) if self.fault == "batch" else out


def mixing(fault: str, **more: Any) -> Mapping[str, Any]:
    return {"own_methods": {"unquantized": (WrongExperts(fault),)}, **more}


_probes = iter(range(10**6))


def restless_probe() -> tuple[Device, ...]:
    return (replace(DEVICE, name=f"right:{next(_probes)}"),)
