"""A platform that breaks its contract is told so when an engine is built: plugin, hook, expected, got."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead import LLM, SamplingParams
from fairlead.config import EngineConfig
from fairlead.engine import builder, planner
from fairlead.errors import ConfigError, PluginContractError
from fairlead.interface import (
    PLATFORM_API,
    UNQUANTIZED,
    AttentionBackend,
    AttentionShape,
    Capabilities,
    Defaults,
    Device,
    MemoryInfo,
    OpProvider,
    PlatformSpec,
)
from fairlead.ops import reference
from fairlead.ops.attention import ReferenceAttention
from fairlead.ops.graph import PassThrough
from fairlead.ops.linear import PlainLinear
from fairlead.ops.memory import PooledAllocator
from fairlead.ops.platform import BasicPlatform
from fairlead.plugins import PlatformRecord
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint
from fairlead.testing.tiny_model import write_tiny_llama

DEVICE = Device(name="acme:0", description="test", memory_bytes=2**30)


class Acme(BasicPlatform):
    """A right platform, to be broken in one place."""

    name = "acme"
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(DEVICE)

    def memory_info(self) -> MemoryInfo:
        return MemoryInfo(total_bytes=2**30, free_bytes=2**29)


class BadAttention(ReferenceAttention):
    """Attention whose result is changed."""

    def __init__(self, platform: Acme, shape: AttentionShape, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(shape, platform.allocator, platform.torch_device)
        self._change = change

    def forward(self, *args: Any) -> Any:
        return self._change(super().forward(*args))


class BadLinear(PlainLinear):
    """A linear method whose results are changed."""

    def __init__(self, change: Callable[[torch.Tensor], Any], pack: Callable[[object], Any] = lambda p: p) -> None:
        super().__init__(reference.linear, "bad")
        self._change, self._pack = change, pack

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        return self._pack(super().pack(tensors))

    def apply(self, *args: Any) -> Any:
        return self._change(super().apply(*args))


class BadAllocator(PooledAllocator):
    offload = None  # type: ignore[assignment]


class Bucketed(PassThrough):
    def __init__(self, *buckets: int) -> None:
        self.buckets = buckets


def op(name: str, change: Callable[[Any], Any]) -> Callable[[Acme], None]:
    """A platform whose provider of an op gives a changed result."""

    def fn(*args: Any) -> Any:
        return change(getattr(reference, name)(*args))

    def spoil(p: Acme) -> None:
        p.ops = lambda: {name: (OpProvider(name="bad", fn=fn),)}  # type: ignore[method-assign]

    return spoil


def member(name: str, value: Any) -> Callable[[Acme], None]:
    return lambda p: setattr(p, name, value)


def attention(change: Callable[[torch.Tensor], Any]) -> Callable[[Acme], None]:
    return lambda p: setattr(p, "attention", lambda name, shape: BadAttention(p, shape, change))


def linear(change: Callable[[Any], Any], **others: Any) -> Callable[[Acme], None]:
    return member("linear_methods", lambda: {UNQUANTIZED: (BadLinear(change, **others),)})


OUT = r"a tensor of shape \(1, 4, 16\), float32, on cpu"

# how the platform is broken, the hook, what was expected, what was got
FAULTS: dict[str, tuple[Callable[[Acme], None], str, str, str]] = {
    "no allocator": (member("allocator", None), "create", "a Platform", "Acme without allocator"),
    "no method": (member("seed", None), "create", "a Platform", "Acme without seed"),
    "method that is data": (member("ops", {}), "ops", "a method", r"\{\}"),
    "another name": (member("name", "other"), "create", "a platform named 'acme'", "'other'"),
    "another device": (member("device", DEVICE.__class__(name="x", description="", memory_bytes=1)), "create",
                       "the platform of device 'acme:0'", "Device"),
    "capabilities": (member("capabilities", {"dtypes": ()}), "capabilities", "Capabilities", "dtypes"),
    "defaults": (member("defaults", None), "create", "a Platform", "without defaults"),
    "default dtype": (
        member("capabilities", Capabilities(dtypes=("bfloat16",), block_sizes=(16,))),
        "defaults", r"a dtype of \('bfloat16',\)", "'float32'",
    ),
    "default block size": (
        member("capabilities", Capabilities(dtypes=("float32",), block_sizes=(8,))),
        "defaults", r"a block size of \(8,\)", "16",
    ),
    "allocator": (lambda p: setattr(p, "allocator", BadAllocator(p.allocate)), "allocator", "a MemoryAllocator",
                  "BadAllocator without offload"),
    "backend names": (member("attention_backends", lambda: []), "attention_backends",
                      "a tuple of at least one name", r"\[\]"),
    "ops None": (member("ops", lambda: None), "ops", "a mapping of names to tuples of OpProvider", "None"),
    "ops no provider": (member("ops", lambda: {"linear": (1,)}), "ops", "an OpProvider", "1"),
    "methods None": (member("linear_methods", lambda: None), "linear_methods", "tuples of LinearMethod", "None"),
    "methods that are none": (member("linear_methods", lambda: {UNQUANTIZED: (None,)}), "linear_methods",
                              "a LinearMethod", "None"),
    "graph runner": (member("graph_runner", lambda: None), "graph_runner", "a GraphRunner", "None"),
    "buckets": (member("graph_runner", lambda: Bucketed(4, 2)), "graph_runner", "buckets: a tuple of rising",
                r"\(4, 2\)"),
    "static without buckets": (
        member("capabilities", Capabilities(dtypes=("float32",), block_sizes=(16,), static_shapes=True)),
        "graph_runner", "buckets for static_shapes", r"\(\)",
    ),
    "memory None": (member("memory_info", lambda: None), "memory_info", "MemoryInfo with 0 <= free", "None"),
    "memory negative": (member("memory_info", lambda: MemoryInfo(total_bytes=8, free_bytes=-1)), "memory_info",
                        "0 <= free_bytes", "free_bytes=-1"),
    "memory huge": (member("memory_info", lambda: MemoryInfo(total_bytes=8, free_bytes=9)), "memory_info",
                    "free_bytes <= total_bytes", "free_bytes=9"),
    "attention None": (member("attention", lambda name, shape: None), r"attention\('reference'\)",
                       "an AttentionBackend", "None"),
    "attention shape": (attention(lambda x: x[:, :2]), r"attention\('reference'\).forward", OUT,
                        r"shape \(1, 2, 16\)"),
    "attention dtype": (attention(lambda x: x.double()), r"attention\('reference'\).forward", OUT, "float64"),
    "attention device": (attention(lambda x: x.to("meta")), r"attention\('reference'\).forward", OUT, "on meta"),
    "attention nothing": (attention(lambda x: None), r"attention\('reference'\).forward", OUT, "None"),
    "op shape": (op("rms_norm", lambda x: x[:, :3]), r"ops\['rms_norm'\] 'bad'", r"\(1, 64\)", r"\(1, 3\)"),
    "op dtype": (op("silu_and_mul", lambda x: x.half()), r"ops\['silu_and_mul'\] 'bad'", "float32", "float16"),
    "op device": (op("embedding", lambda x: x.to("meta")), r"ops\['embedding'\] 'bad'", "on cpu", "on meta"),
    "op None": (op("linear", lambda x: None), r"ops\['linear'\] 'bad'", "float32", "None"),
    "op half a result": (op("fused_add_rms_norm", lambda x: x[0]), r"ops\['fused_add_rms_norm'\] 'bad'",
                         "2 tensors", "shape"),
    "op second result": (op("rotary_embedding", lambda x: (x[0], x[1][:, :1])), r"ops\['rotary_embedding'\] 'bad'",
                         r"\(1, 2, 16\)", r"\(1, 1, 16\)"),
    "pack None": (linear(lambda x: x, pack=lambda p: None), r"linear_methods 'bad'.pack", "what apply wants", "None"),
    "apply shape": (linear(lambda x: x[:, :5]), r"linear_methods 'bad'.apply", "a tensor of shape", r"\(1, 5\)"),
    "apply dtype": (linear(lambda x: x.bfloat16()), r"linear_methods 'bad'.apply", "float32", "bfloat16"),
    "apply None": (linear(lambda x: None), r"linear_methods 'bad'.apply", "float32", "None"),
}  # fmt: skip


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Acme:
    """The platform that every build of the test runs on."""
    platform = Acme()
    spec = PlatformSpec(
        name="acme", api_version=PLATFORM_API, priority=1, probe=lambda: (DEVICE,), create=lambda device: platform
    )
    record = PlatformRecord(
        name="acme", distribution="acme", version="1", status="available", devices=(DEVICE,), spec=spec
    )
    monkeypatch.setattr(planner.plugins, "choose", lambda config: (record, DEVICE))
    return platform


def build(directory: Path, **settings: Any) -> builder.BuiltEngine:
    model = write_tiny_llama(directory, num_layers=1)
    return builder.build(EngineConfig.of(model=str(model), num_blocks=40, **settings))


def test_the_platform_is_right_before_it_is_broken(tmp_path: Path, platform: Acme) -> None:
    build(tmp_path)
    op("rms_norm", lambda x: x)(platform)
    linear(lambda x: x)(platform)
    built = build(tmp_path)
    wrapped = [v for m in built.runner.model.modules() for v in vars(m).values() if type(v).__name__ == "FirstCall"]  # type: ignore[attr-defined]
    assert wrapped == []  # later steps pay nothing for the check


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("draw", {"temperature": 1.0}),
        ("draw_filtered", {"temperature": 1.0, "top_k": 5}),
        ("apply_penalties", {"temperature": 0.0, "presence_penalty": 0.1}),
    ],
)
def test_sampling_runs_on_the_platforms_ops(tmp_path: Path, platform: Acme, name: str, params: dict[str, Any]) -> None:
    calls = []

    def fn(*args: Any) -> Any:
        calls.append(name)
        return getattr(reference, name)(*args)

    model = str(write_tiny_llama(tmp_path, num_layers=1))
    platform.ops = lambda: {name: (OpProvider(name="own", fn=fn),)}  # type: ignore[method-assign]
    for overrides, num_calls in (((), 3), ((f"{name}=reference",), 0)):
        calls.clear()
        llm = LLM(model, skip_tokenizer_init=True, num_blocks=40, op_providers=overrides)
        llm.generate([{"prompt_token_ids": [1, 2]}], SamplingParams(max_tokens=3, seed=0, ignore_eos=True, **params))
        assert len(calls) == num_calls


@pytest.mark.parametrize("fault", FAULTS)
def test_a_breach_is_named(tmp_path: Path, platform: Acme, fault: str) -> None:
    spoil, hook, expected, got = FAULTS[fault]
    spoil(platform)
    pattern = f"^plugin 'acme' broke the contract in ({hook}): expected .*{expected}.*, got .*{got}"
    with pytest.raises(PluginContractError, match=pattern):
        build(tmp_path)


def test_every_reason_comes_in_one_error(tmp_path: Path, platform: Acme) -> None:
    class Static(PassThrough):
        buckets: tuple[int, ...] = (1, 8)

    def refuse(name: str, shape: AttentionShape) -> AttentionBackend:
        raise ConfigError("acme has no grouped queries")

    platform.attention = refuse  # type: ignore[method-assign]
    platform.graph_runner = Static  # type: ignore[method-assign]
    platform.capabilities = Capabilities(
        dtypes=("bfloat16",), block_sizes=(32,), head_sizes=(64, 96), static_shapes=True, max_batched_tokens=512
    )
    platform.defaults = Defaults(
        dtype="bfloat16", block_size=32, max_num_batched_tokens=1024, device_memory_utilization=0.5
    )
    with pytest.raises(ConfigError) as error:
        build(tmp_path, dtype="float32", block_size=16, max_model_len=600)
    assert str(error.value) == (
        "platform 'acme' cannot run this model so: dtype float32 (it has bfloat16); block_size 16 (it has 32); "
        "max_model_len 600 (the model was made for 512); max_num_batched_tokens 1024 (at most 512); "
        "max_num_batched_tokens 1024 (its largest static shape has 8 rows); head size 16 (it has 64, 96); "
        "acme has no grouped queries"
    )
    with pytest.raises(ConfigError, match=r"block_size 16 \(it has 32\); .*op 'rms_norm' has no provider 'fast'"):
        build(tmp_path, block_size=16, op_providers=["rms_norm=fast"])
    assert platform.allocator.allocated_bytes("weights") == platform.allocator.allocated_bytes("kv_cache") == 0


def test_each_kind_of_layers_gets_the_first_backend_that_serves_it(tmp_path: Path, platform: Acme) -> None:
    class Plain(ReferenceAttention):
        name = "plain"

    def attention(name: str, shape: AttentionShape) -> AttentionBackend:
        if name == "plain" and shape.spec.sliding_window is not None:
            raise ConfigError("plain knows no windows")
        return (Plain if name == "plain" else ReferenceAttention)(shape, platform.allocator, platform.torch_device)

    platform.attention_backends = lambda: ("plain", "reference")  # type: ignore[method-assign]
    platform.attention = attention  # type: ignore[method-assign]
    model = str(write_tiny_checkpoint(tmp_path, "gemma2"))
    plan = planner.plan_engine(EngineConfig.of(model=model))
    windows = {
        group.sliding_window: backend.name for group, backend in zip(plan.cache_groups, plan.backends, strict=True)
    }
    assert windows == {None: "plain", 24: "reference"}
    assert plan.info.attention_backend == ", ".join(backend.name for backend in plan.backends)
    with pytest.raises(ConfigError, match="plain knows no windows"):
        planner.plan_engine(EngineConfig.of(model=model, attention_backend="plain"))


def test_impossible_capabilities_cannot_be_said() -> None:
    for wrong in (
        {"dtypes": ()},
        {"block_sizes": (0,)},
        {"max_num_seqs": 0},
        {"kv_layouts": ()},
        {"head_sizes": (-8,)},
    ):
        settings: dict[str, Any] = {"dtypes": ("float32",), "block_sizes": (16,), **wrong}
        with pytest.raises(ValueError, match="Capabilities"):
            Capabilities(**settings)
