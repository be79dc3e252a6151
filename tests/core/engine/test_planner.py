"""What a config, a checkpoint and a platform agree on, and how they say that they cannot."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fairlead.checkpoint import Checkpoint
from fairlead.config import EngineConfig
from fairlead.engine import builder, negotiation, planner
from fairlead.errors import CheckpointError, ConfigError, KVCacheMemoryError, ModelMemoryError
from fairlead.interface import (
    PLATFORM_API,
    AttentionBackend,
    AttentionShape,
    AttentionSpec,
    Capabilities,
    Device,
    MemoryInfo,
    MemoryProfile,
    OpProvider,
    PlatformSpec,
)
from fairlead.models.config import ModelShape
from fairlead.ops import reference
from fairlead.ops.attention import ReferenceAttention
from fairlead.plugins import PlatformRecord
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_cpu.platform import CpuPlatform

DEVICE = Device(name="acme:0", description="a device that does not exist", memory_bytes=2**40)
BACKENDS = ", ".join(CpuPlatform(DEVICE).attention_backends())
WEIGHTS_BYTES = 4 * (2 * 128 * 64 + 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64))
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # keys and values, layers, kv-heads, head size, float32
# 2048 tokens of twice the width, and of what gate and up projection take and give; 256 rows of logits, twice.
STEP_BYTES = 4 * 2048 * (2 * 64 + 64 + 2 * 128) + 2 * 4 * 256 * 128
HIDDEN_BYTES = 4 * 2048 * 64  # of all tokens, there while the logits are made


class AcmePlatform(CpuPlatform):
    """The CPU under another name, with chosen limits."""

    name = "acme"

    def __init__(self) -> None:
        super().__init__(DEVICE)
        self.memory = MemoryInfo(total_bytes=2**40, free_bytes=2**40)
        self.providers: dict[str, tuple[OpProvider, ...]] = {}
        self.step_bytes: int | None = STEP_BYTES
        self.num_profiles = 0
        self.unavailable: dict[str, str] = {}
        self.shapes: list[AttentionShape] = []

    def unavailable_backends(self) -> Mapping[str, str]:
        return self.unavailable

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        self.shapes.append(shape)
        return super().attention(name, dataclasses.replace(shape, kv_dtype="auto"))

    def memory_info(self) -> MemoryInfo:
        return self.memory

    def memory_profile(self, work: Callable[[], None]) -> MemoryProfile | None:
        self.num_profiles += 1
        work()
        if self.step_bytes is None:
            return None
        return MemoryProfile(peak_bytes=self.step_bytes - HIDDEN_BYTES, kept_bytes=0)  # of any work

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        return self.providers


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> AcmePlatform:
    """The platform that every build of the test runs on."""
    platform = AcmePlatform()
    spec = PlatformSpec(
        name="acme", api_version=PLATFORM_API, priority=1, probe=lambda: (DEVICE,), create=lambda device: platform
    )
    record = PlatformRecord(
        name="acme", distribution="acme", version="1", status="available", devices=(DEVICE,), spec=spec
    )
    monkeypatch.setattr(planner.plugins, "choose", lambda config: (record, DEVICE))
    return platform


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path)


def build(model: Path, **settings: Any) -> builder.BuiltEngine:
    return builder.build(EngineConfig.of(model=str(model), **settings))


def restrict(platform: CpuPlatform, **changes: Any) -> None:
    platform.capabilities = dataclasses.replace(platform.capabilities, **changes)


def test_settings_are_the_users_else_the_platforms_else_the_models(model: Path, platform: AcmePlatform) -> None:
    found = build(model).plan.settings
    assert found == planner.Negotiated(
        dtype="float32",
        block_size=16,
        max_model_len=512,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        attention_backend=platform.attention_backends()[0],
        kv_dtype="auto",
        device_memory_utilization=0.5,
        async_scheduling=False,
    )
    asked = {
        "dtype": "bfloat16",
        "block_size": 8,
        "max_model_len": 100,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 64,
        "attention_backend": "Reference",
        "device_memory_utilization": 0.25,
        "async_scheduling": True,
    }
    assert dataclasses.asdict(build(model, **asked).plan.settings) == {
        **asked,
        "attention_backend": "reference",
        "kv_dtype": "auto",
    }


@pytest.mark.parametrize(
    ("stored", "supported", "expected"),
    [
        ("bfloat16", ("bfloat16", "float32"), "bfloat16"),
        ("float32", ("bfloat16", "float32"), "float32"),
        ("float16", ("bfloat16", "float32"), "bfloat16"),  # the platform's choice
    ],
)
def test_auto_is_the_stored_dtype_where_the_platform_has_it(
    tmp_path: Path, platform: AcmePlatform, stored: str, supported: tuple[str, ...], expected: str
) -> None:
    write_tiny_llama(tmp_path, dtype=stored)
    restrict(platform, dtypes=supported)
    built = build(tmp_path, num_blocks=40)
    assert built.plan.settings.dtype == built.plan.info.dtype == expected
    assert all(str(p.dtype) == f"torch.{expected}" for p in built.runner.model.parameters())  # type: ignore[attr-defined]


def test_info_is_what_was_built(model: Path, platform: AcmePlatform) -> None:
    info = build(model, num_blocks=50, max_num_seqs=7).plan.info
    assert info.vocab_size == 128
    assert (info.platform, info.device) == ("acme", "acme:0 (a device that does not exist)")
    assert (info.num_blocks, info.block_size, info.max_num_seqs) == (50, 16, 7)
    assert info.weights_bytes == WEIGHTS_BYTES
    assert info.kv_cache_bytes == 50 * 16 * TOKEN_BYTES


def test_all_reasons_come_at_once_and_nothing_is_allocated(model: Path, platform: AcmePlatform) -> None:
    platform.capabilities = Capabilities(
        dtypes=("float32",), block_sizes=(128, 16), head_sizes=(64, 128), max_batched_tokens=1024
    )
    platform.defaults = dataclasses.replace(platform.defaults, dtype="float32")
    with pytest.raises(ConfigError) as error:
        build(model, dtype="bfloat16", block_size=32, max_model_len=513, attention_backend="flash")
    assert str(error.value) == (
        "platform 'acme' cannot run this model so: dtype bfloat16 (it has float32); block_size 32 (it has 16, 128); "
        f"max_model_len 513 (the model was made for 512); attention_backend flash (it has {BACKENDS}); "
        "max_num_batched_tokens 2048 (at most 1024); head size 16 (it has 64, 128)"
    )
    assert platform.allocator.allocated_bytes("weights") == platform.allocator.allocated_bytes("kv_cache") == 0


def test_no_more_sequences_run_than_the_platform_can(model: Path, platform: AcmePlatform) -> None:
    restrict(platform, max_num_seqs=8)
    assert build(model).plan.settings.max_num_seqs == 8
    assert build(model, max_num_seqs=3).plan.settings.max_num_seqs == 3


@pytest.mark.parametrize(
    ("settings", "changes", "reason"),
    [
        ({"dtype": "float16"}, {}, "dtype float16 (it has bfloat16, float32)"),
        ({"block_size": 24}, {}, "block_size 24 (it has 1, 2, 4, 8, 16, 32, 64, 128)"),
        ({}, {"head_sizes": (8, 32)}, "head size 16 (it has 8, 32)"),
        ({"max_model_len": 1000}, {}, "max_model_len 1000 (the model was made for 512)"),
        ({"max_num_batched_tokens": 65}, {"max_batched_tokens": 64}, "max_num_batched_tokens 65 (at most 64)"),
        ({"attention_backend": "flash"}, {}, f"attention_backend flash (it has {BACKENDS})"),
        ({"kv_cache_dtype": "fp8"}, {"kv_dtypes": ("auto",)}, "kv_cache_dtype fp8 (it has auto)"),
        ({"kv_cache_dtype": "bfloat16"}, {"kv_dtypes": ("auto",)}, "kv_cache_dtype bfloat16 (it has auto)"),
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            {"kv_dtypes": ("auto", "float8_e4m3fn")},
            "kv_cache_dtype fp8_e5m2 (it has auto, float8_e4m3fn)",
        ),
    ],
    ids=str,
)
def test_a_single_reason_stands_alone(
    model: Path, platform: AcmePlatform, settings: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    restrict(platform, **changes)
    with pytest.raises(ConfigError, match=f"^platform 'acme' cannot run this model so: {re.escape(reason)}$"):
        build(model, **settings)


def test_a_backend_that_is_missing_says_why(model: Path, platform: AcmePlatform) -> None:
    platform.unavailable = {"SWIFT": "no package 'swift' is installed", "keen": "the device is too old for it"}
    with pytest.raises(ConfigError) as error:
        build(model, attention_backend="swift")
    reason = f"attention_backend swift (no package 'swift' is installed; it has {BACKENDS}; not keen: the device is"
    assert reason in str(error.value)
    with pytest.raises(ConfigError) as error:
        build(model, attention_backend="fast")
    assert f"attention_backend fast (it has {BACKENDS}; not SWIFT: no package" in str(error.value)


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("auto", "auto"),
        ("fp8", "float8_e4m3fnuz"),
        ("fp8_e4m3", "float8_e4m3fnuz"),
        ("fp8_e5m2", "float8_e5m2"),
        ("bfloat16", "bfloat16"),
        ("float16", None),
    ],
)
def test_a_cache_of_8_bits_is_of_the_kind_that_the_device_has(
    platform: AcmePlatform, asked: str, named: str | None
) -> None:
    restrict(platform, kv_dtypes=("auto", "bfloat16", "float8_e4m3fnuz", "float8_e5m2"))
    assert negotiation.kv_dtype_of(platform, asked) == named


def test_the_reference_keeps_the_models_dtype_or_says_so(model: Path, platform: AcmePlatform) -> None:
    spec = AttentionSpec(num_heads=2, num_kv_heads=2, head_size=16, scale=1.0)
    shape = AttentionShape(spec=spec, num_layers=1, block_size=16, dtype="float32", kv_dtype="float8_e4m3fn")
    with pytest.raises(ConfigError, match="'reference' attention backend keeps float32 in its cache, not float8_e4"):
        ReferenceAttention(shape, platform.allocator, torch.device("cpu"))


def test_backends_are_made_for_the_dtype_of_the_cache(model: Path, platform: AcmePlatform) -> None:
    restrict(platform, kv_dtypes=("auto", "bfloat16"))
    built = build(model, kv_cache_dtype="bfloat16")
    assert built.plan.settings.kv_dtype == "bfloat16"
    assert [shape.kv_dtype for shape in platform.shapes] == ["bfloat16"]


def test_no_config_is_changed(model: Path, platform: AcmePlatform) -> None:
    config = EngineConfig.of(model=str(model), max_num_seqs=5, op_providers=["linear=reference"])
    before = dataclasses.asdict(config)
    checkpoint = Checkpoint.open(config.model)
    stored = repr(checkpoint.config)
    planner.negotiate(config, checkpoint, ModelShape.of(checkpoint.config), platform)
    builder.build(config)
    assert dataclasses.asdict(config) == before
    assert repr(checkpoint.config) == stored


def test_ops_are_chosen_once_by_config(model: Path, platform: AcmePlatform) -> None:
    platform.providers = {"rms_norm": (OpProvider(name="fast", fn=reference.rms_norm),)}
    assert build(model).plan.op_providers["rms_norm"] == "fast"
    assert build(model, op_providers=["rms_norm=reference"]).plan.op_providers["rms_norm"] == "reference"
    with pytest.raises(ConfigError, match="op 'linear' has no provider 'fast'; it has: reference"):
        build(model, op_providers=["linear=fast"])


def by_blocks(platform: AcmePlatform, num_tokens: int) -> dict[str, Any]:
    return {"num_blocks": num_tokens // 16}


def by_bytes(platform: AcmePlatform, num_tokens: int) -> dict[str, Any]:
    return {"kv_cache_memory": num_tokens * TOKEN_BYTES + 1}


def by_share(platform: AcmePlatform, num_tokens: int) -> dict[str, Any]:
    total = 4 * (WEIGHTS_BYTES + STEP_BYTES + num_tokens * TOKEN_BYTES)
    platform.memory = MemoryInfo(total_bytes=total, free_bytes=total)
    return {"device_memory_utilization": 0.25}


def by_free_memory(platform: AcmePlatform, num_tokens: int) -> dict[str, Any]:
    platform.memory = MemoryInfo(
        total_bytes=2**40, free_bytes=WEIGHTS_BYTES + STEP_BYTES + num_tokens * TOKEN_BYTES + 100
    )
    return {}


@pytest.mark.parametrize("limit", [by_blocks, by_bytes, by_share, by_free_memory])
def test_too_little_memory_names_a_length_that_fits(
    model: Path, platform: AcmePlatform, limit: Callable[[AcmePlatform, int], dict[str, Any]]
) -> None:
    settings = limit(platform, 10 * 16)
    with pytest.raises(KVCacheMemoryError) as error:
        build(model, **settings)
    message = str(error.value)
    assert "max_model_len 512 needs 32 KV blocks (0.2 MiB), but there are 10 (0.1 MiB)" in message
    assert platform.allocator.allocated_bytes("weights") == platform.allocator.allocated_bytes("kv_cache") == 0
    found = re.search(r"--max-model-len to at most (\d+)", message)
    assert found is not None
    largest = int(found[1])
    assert largest == 160
    built = build(model, max_model_len=largest, **settings)
    assert built.plan.info.num_blocks >= 10
    with pytest.raises(KVCacheMemoryError):
        build(model, max_model_len=largest + 1, **settings)


@pytest.mark.parametrize(
    "free", [WEIGHTS_BYTES, WEIGHTS_BYTES + STEP_BYTES, WEIGHTS_BYTES + STEP_BYTES + 16 * TOKEN_BYTES - 1]
)
def test_no_memory_for_a_single_block(model: Path, platform: AcmePlatform, free: int) -> None:
    platform.memory = MemoryInfo(total_bytes=2**40, free_bytes=free)
    with pytest.raises(KVCacheMemoryError, match=r"there are 0 \(0\.0 MiB\); give the cache more memory"):
        build(model)


@pytest.mark.parametrize("free", [0, 1000, WEIGHTS_BYTES - 1])
@pytest.mark.parametrize("settings", [{}, {"num_blocks": 40}, {"kv_cache_memory": 2**20}], ids=str)
def test_weights_larger_than_the_memory(
    model: Path, platform: AcmePlatform, settings: dict[str, Any], free: int
) -> None:
    platform.memory = MemoryInfo(total_bytes=2**30, free_bytes=free)
    with pytest.raises(ModelMemoryError) as error:
        build(model, **settings)
    assert str(error.value) == (
        "the weights need 0.00 GiB in float32, but platform 'acme' has 0.00 GiB free of 1.00; take a smaller model or "
        "--dtype, or end what holds the memory"
    )
    assert platform.allocator.allocated_bytes("weights") == platform.num_profiles == 0


@pytest.mark.parametrize("step_bytes", [HIDDEN_BYTES, STEP_BYTES, 3 * STEP_BYTES])
def test_the_cache_gets_what_a_measured_step_leaves(model: Path, platform: AcmePlatform, step_bytes: int) -> None:
    platform.step_bytes = step_bytes
    room = 5 * STEP_BYTES + WEIGHTS_BYTES
    platform.memory = MemoryInfo(total_bytes=2 * room, free_bytes=2 * room)
    info = build(model).plan.info
    assert info.num_blocks == (room - WEIGHTS_BYTES - step_bytes) // (16 * TOKEN_BYTES)
    assert (info.activation_bytes, info.activations_measured) == (step_bytes, True)
    assert info.weights_bytes + info.activation_bytes + info.kv_cache_bytes <= room


def test_a_step_that_leaves_too_little_is_told_after_loading(model: Path, platform: AcmePlatform) -> None:
    room = 2 * STEP_BYTES + WEIGHTS_BYTES
    platform.memory = MemoryInfo(total_bytes=room, free_bytes=room)
    platform.step_bytes = room - WEIGHTS_BYTES - 10 * 16 * TOKEN_BYTES
    with pytest.raises(KVCacheMemoryError, match=r"there are 10 \(0\.1 MiB\); set --max-model-len to at most 160"):
        build(model, device_memory_utilization=1.0)
    assert platform.num_profiles == 4  # two steps and two samplings


@pytest.mark.parametrize("change", [-1, 1])
def test_neighbours_on_the_device_may_come_and_go(model: Path, platform: AcmePlatform, change: int) -> None:
    """Free memory that grows or shrinks while the step is measured decides how large the cache is, and nothing else."""
    free = WEIGHTS_BYTES + STEP_BYTES + 1000 * 16 * TOKEN_BYTES
    platform.memory = MemoryInfo(total_bytes=2**40, free_bytes=free)

    def measure(work: Callable[[], None]) -> MemoryProfile:
        work()
        left = free - WEIGHTS_BYTES + change * 500 * 16 * TOKEN_BYTES
        platform.memory = MemoryInfo(total_bytes=2**40, free_bytes=left)
        return MemoryProfile(peak_bytes=STEP_BYTES - HIDDEN_BYTES, kept_bytes=0)

    platform.memory_profile = measure  # type: ignore[method-assign]
    assert build(model).plan.info.num_blocks == 1000 + change * 500


@pytest.mark.parametrize("settings", [{"num_blocks": 40}, {"kv_cache_memory": 2**20}], ids=str)
def test_a_cache_of_a_given_size_needs_no_profile(
    model: Path, platform: AcmePlatform, settings: dict[str, Any]
) -> None:
    info = build(model, **settings).plan.info
    assert platform.num_profiles == 0
    assert (info.activation_bytes, info.activations_measured) == (STEP_BYTES, False)


def test_a_platform_that_cannot_measure_leaves_the_estimate(model: Path, platform: AcmePlatform) -> None:
    platform.step_bytes = None
    info = build(model).plan.info
    assert (info.activation_bytes, info.activations_measured) == (STEP_BYTES, False)


def test_the_cache_is_no_larger_than_can_be_used(model: Path, platform: AcmePlatform) -> None:
    assert build(model, max_num_seqs=4).plan.info.num_blocks == 4 * 32
    assert build(model, max_num_seqs=4, max_model_len=17).plan.info.num_blocks == 4 * 2


@pytest.mark.parametrize("settings", [{"num_blocks": 10**15}, {"kv_cache_memory": 2**50}], ids=str)
def test_more_than_the_device_has(model: Path, platform: AcmePlatform, settings: dict[str, Any]) -> None:
    with pytest.raises(KVCacheMemoryError, match=r"KV blocks need .* MiB, but the device has 1048576\.0 MiB in all"):
        build(model, **settings)
    assert platform.allocator.allocated_bytes("weights") == 0


GIB = 2**30


def test_swap_space_is_shared_out_as_the_cache_is(tmp_path: Path, platform: AcmePlatform) -> None:
    write_tiny_checkpoint(tmp_path, "gemma2", settings={"sliding_window": 24})
    plan = planner.plan_engine(EngineConfig.of(model=str(tmp_path), num_blocks=64, max_num_batched_tokens=16))
    assert [group.num_host_blocks for group in plan.cache_groups] == [0, 0]
    assert (plan.info.swap_bytes, plan.info.swap_costs) == (0, "")
    swap_space = 2.5 * plan.info.kv_cache_bytes / GIB
    settings = {"num_blocks": 64, "max_num_batched_tokens": 16, "swap_space": swap_space}
    plan = planner.plan_engine(EngineConfig.of(model=str(tmp_path), **settings))
    assert len({group.num_blocks for group in plan.cache_groups}) == 2
    assert [g.num_host_blocks for g in plan.cache_groups] == [int(2.5 * g.num_blocks) for g in plan.cache_groups]
    assert 0.98 * swap_space * GIB <= plan.info.swap_bytes <= swap_space * GIB


def test_swap_space_must_fit_beside_weights_and_cache(
    model: Path, platform: AcmePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = WEIGHTS_BYTES + 64 * 16 * TOKEN_BYTES
    platform.memory = MemoryInfo(total_bytes=2**40, free_bytes=taken + GIB // 2)
    plan = planner.plan_engine(EngineConfig.of(model=str(model), num_blocks=64, swap_space=0.5))
    assert plan.info.swap_bytes == GIB // 2
    with pytest.raises(
        KVCacheMemoryError, match=r"needs 0\.75 GiB of host memory, but .* 0\.50 GiB are available; set --swap-space"
    ):
        planner.plan_engine(EngineConfig.of(model=str(model), num_blocks=64, swap_space=0.75))
    platform.memory = MemoryInfo(total_bytes=2**40, free_bytes=WEIGHTS_BYTES)
    with pytest.raises(KVCacheMemoryError, match=r"0\.00 GiB are available"):
        planner.plan_engine(EngineConfig.of(model=str(model), num_blocks=64, swap_space=0.75))


def test_swap_space_holds_a_block_at_least(model: Path, platform: AcmePlatform) -> None:
    block_bytes = 16 * TOKEN_BYTES
    plan = planner.plan_engine(EngineConfig.of(model=str(model), num_blocks=64, swap_space=block_bytes / GIB))
    assert [group.num_host_blocks for group in plan.cache_groups] == [1]
    with pytest.raises(KVCacheMemoryError, match="does not hold one KV block") as error:
        planner.plan_engine(EngineConfig.of(model=str(model), num_blocks=64, swap_space=(block_bytes - 1) / GIB))
    found = re.search(r"--swap-space to at least ([0-9.]+), or to 0", str(error.value))
    assert found is not None
    assert float(found[1]) == pytest.approx(block_bytes / GIB, rel=1e-3)


def test_a_platform_that_cannot_swap_says_so(
    model: Path, platform: AcmePlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "max_swap_bytes", lambda device_bytes: None)
    assert planner.plan_engine(EngineConfig.of(model=str(model))).info.swap_bytes == 0
    with pytest.raises(
        ConfigError, match=r"platform 'acme' cannot .*: swap_space 4 \(it cannot copy KV blocks to host"
    ):
        planner.plan_engine(EngineConfig.of(model=str(model), swap_space=4))


def test_an_endless_context_is_refused_before_its_tables_are_made(tmp_path: Path, platform: AcmePlatform) -> None:
    write_tiny_llama(tmp_path, max_position_embeddings=2**24)
    platform.memory = MemoryInfo(total_bytes=2**30, free_bytes=2**30)
    with pytest.raises(KVCacheMemoryError, match="max_model_len 16777216 needs"):
        build(tmp_path)


def test_dummy_weights_need_no_files(model: Path, platform: AcmePlatform) -> None:
    (model / "model.safetensors").unlink()
    built = build(model, load_format="dummy", num_blocks=40)
    assert built.plan.info.weights_bytes == WEIGHTS_BYTES
    assert all(p.isfinite().all() for p in built.runner.model.parameters())  # type: ignore[attr-defined]


def test_memory_comes_back_when_an_engine_goes(model: Path, platform: AcmePlatform) -> None:
    built = build(model, num_blocks=40)
    assert platform.allocator.allocated_bytes("weights") == WEIGHTS_BYTES
    assert platform.allocator.allocated_bytes("kv_cache") == 40 * 16 * TOKEN_BYTES
    del built
    assert platform.allocator.allocated_bytes("weights") == platform.allocator.allocated_bytes("kv_cache") == 0


def test_a_broken_checkpoint_is_found_before_memory_is_allocated(model: Path, platform: AcmePlatform) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is truncated"):
        build(model)
    assert platform.allocator.allocated_bytes("weights") == platform.allocator.allocated_bytes("kv_cache") == 0
    assert isinstance(platform.torch_device, torch.device)
