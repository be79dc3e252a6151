"""What the three platforms say of their devices, and which libraries they take in; on fake devices."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_device import GIB, FakeModule
from fake_platforms import XPU_28, make

from fairlead.config import EngineConfig
from fairlead.contract import check_platform
from fairlead.engine.negotiation import backend_reason, kv_dtype_of
from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, AttentionSpec, LinearShape
from fairlead.ops import reference
from fairlead.ops.attention import ReferenceAttention
from fairlead_rocm.platform import Arch
from fairlead_triton.device.platform import DevicePlatform

NAMES = ("cuda", "rocm", "xpu")


def shape(block_size: int = 16, dtype: str = "bfloat16", kv_dtype: str = "auto", **spec: Any) -> AttentionShape:
    head = {"num_heads": 4, "num_kv_heads": 2, "head_size": 16, "scale": 0.25, **spec}
    return AttentionShape(
        spec=AttentionSpec(**head), num_layers=2, block_size=block_size, dtype=dtype, kv_dtype=kv_dtype
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_platform_is_whole(name: str) -> None:
    platform = make(name)
    check_platform(platform, name, platform.device)
    c, d = platform.capabilities, platform.defaults
    assert (c.dtypes[0], d.dtype, d.async_scheduling) == ("bfloat16", "bfloat16", True)
    assert set(c.block_sizes) >= {16, 32, 64, 128}
    assert kv_dtype_of(platform, "fp8") == "float8_e4m3fn"
    assert (c.graphs, c.batch_invariant, c.max_world_size) == (True, False, 1)
    assert make(name, graphs=False).capabilities.graphs is False
    assert make(name, graphs=False).graph_runner().buckets == ()
    assert platform.attention_backends()[0] == "triton"
    assert platform.attention("triton", shape()).name == "triton"
    stored = platform.attention("triton", shape(kv_dtype="float8_e5m2"))
    assert stored.block_bytes() == platform.attention("triton", shape()).block_bytes() / 2


@pytest.mark.parametrize(
    ("capability", "dtypes", "default"),
    [((9, 0), ("bfloat16", "float16", "float32"), "bfloat16"), ((7, 5), ("float16", "float32"), "float16")],
)
def test_an_old_nvidia_device_has_no_bfloat16(capability: tuple[int, int], dtypes: Any, default: str) -> None:
    platform: Any = make("cuda", module=FakeModule(total_bytes=GIB, capability=capability))
    assert (platform.capabilities.dtypes, platform.defaults.dtype) == (dtypes, default)
    assert platform.traits.native_fp8 is (capability == (9, 0))
    assert platform.traits.shared_memory_bytes == 232448


@pytest.mark.parametrize(
    ("name", "has_bfloat16", "fp8"),
    [
        ("gfx90a:sramecc+:xnack-", True, None),
        ("gfx908", False, None),
        ("gfx942", True, torch.float8_e4m3fnuz),
        ("gfx950", True, torch.float8_e4m3fn),
        ("gfx1030", False, None),
        ("gfx1100", True, None),
        ("gfx1201", True, torch.float8_e4m3fn),
        ("gfx1300", True, torch.float8_e4m3fn),  # one that nobody has listed works as its family does
    ],
)
def test_an_amd_device_is_known_by_its_architecture(name: str, has_bfloat16: bool, fp8: Any) -> None:
    arch = Arch.of(name, 32)
    assert (arch.has_bfloat16, arch.matrix_fp8, arch.wave_size) == (has_bfloat16, fp8, 32)
    module = FakeModule(total_bytes=GIB, properties={"gcnArchName": name, "warp_size": 32})
    platform: Any = make("rocm", module=module)
    assert platform.defaults.dtype == ("bfloat16" if has_bfloat16 else "float16")
    assert platform.traits.native_fp8 is (fp8 is torch.float8_e4m3fn)
    assert (platform.tuning_key, platform.traits.warp_size) == (name.partition(":")[0], 32)


def test_a_name_that_is_no_architecture_is_refused() -> None:
    with pytest.raises(ConfigError, match="no device is called 'oddity' here"):
        make("rocm", module=FakeModule(properties={"gcnArchName": "oddity:xnack-"}))


@pytest.mark.parametrize(
    ("name", "changes", "methods"),
    [
        ("cuda", {"capability": (9, 0)}, ["scaled_mm", "triton"]),
        ("cuda", {"capability": (8, 0)}, None),
        ("rocm", {"properties": {"gcnArchName": "gfx942"}}, ["scaled_mm", "triton"]),
        ("rocm", {"properties": {"gcnArchName": "gfx1100"}}, None),
        ("xpu", {}, None),
    ],
)
def test_fp8_is_a_scheme_of_devices_that_multiply_it(name: str, changes: dict[str, Any], methods: Any) -> None:
    platform = make(name, module=FakeModule(total_bytes=GIB, **changes))
    found = platform.linear_methods().get("fp8")
    assert (found and [method.name for method in found]) == methods
    assert platform.capabilities.quantization == ("int8", "int4", *(("fp8",) if methods else ()))
    shape = LinearShape(in_features=64, out_features=64, dtype="bfloat16")
    if found:
        chosen = next(method.name for method in found if method.refuses(shape) is None)
        assert chosen == ("scaled_mm" if name == "cuda" else "triton")


def test_another_device_of_several() -> None:
    module = FakeModule(total_bytes=GIB, num_devices=4)
    platform = make("cuda", module=module)
    assert platform.capabilities.max_world_size == 4
    with pytest.raises(ConfigError, match=r"runs a model on at most 4 of its devices here; rank 0 of 5 was asked for"):
        platform.communicator(0, 5)
    assert platform.communicator(0, 1).world_size == 1


# Optional libraries


def varlen(q_THD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """flash_attn_varlen_func in terms of the reference."""
    assert options["causal"] is True
    lens = [options[f"cu_seqlens_{x}"].diff().tolist() for x in "qk"]
    assert (options["max_seqlen_q"], options["max_seqlen_k"]) == (max(lens[0]), max(lens[1]))
    left, right = options["window_size"]
    slopes = options["alibi_slopes"]
    spec = AttentionSpec(
        num_heads=q_THD.shape[1],
        num_kv_heads=k.shape[2],
        head_size=q_THD.shape[2],
        scale=options["softmax_scale"],
        sliding_window=None if (left, right) == (-1, -1) else left + 1,
        soft_cap=options["softcap"] or None,
        alibi_slopes=None if slopes is None else tuple(slopes.tolist()),
    )
    flat = [x.reshape(-1, *x.shape[2:]) for x in (k, v)]
    return reference.paged_attention(q_THD, *flat, *lens, options["block_table"], k.shape[1], spec)


class Wrapper:
    """FlashInfer's, in terms of the reference."""

    def __init__(self, workspace: torch.Tensor, layout: str) -> None:
        assert (workspace.dtype, layout) == (torch.uint8, "NHD")

    def plan(
        self, queries: Any, blocks: Any, indices: Any, last: Any, heads: int, kv_heads: int, head: int, size: int,
        *, causal: bool, sm_scale: float, window_left: int, logits_soft_cap: float | None, q_data_type: Any,
        kv_data_type: Any,
    ) -> None:  # fmt: skip
        assert causal
        assert q_data_type is kv_data_type is torch.bfloat16
        self.spec = AttentionSpec(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head,
            scale=sm_scale,
            sliding_window=None if window_left < 0 else window_left + 1,
            soft_cap=logits_soft_cap,
        )
        self.lens = queries.diff().tolist(), ((blocks.diff() - 1) * size + last).tolist()
        self.size, self.tables = size, torch.zeros((len(last), int(blocks.diff().max())), dtype=torch.int32)
        for i, (start, end) in enumerate(zip(blocks[:-1].tolist(), blocks[1:].tolist(), strict=True)):
            self.tables[i, : end - start] = indices[start:end]

    def run(self, q_THD: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        flat = [x.reshape(-1, *x.shape[2:]) for x in caches]
        return reference.paged_attention(q_THD, *flat, *self.lens, self.tables, self.size, self.spec)


LIBRARIES = {
    "flash_attn": SimpleNamespace(flash_attn_varlen_func=varlen),
    "flashinfer": SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper),
    "aiter": SimpleNamespace(flash_attn_varlen_func=varlen, rms_norm=reference.rms_norm),
}


def installed(distribution: str) -> str | None:
    """All of the attention libraries."""
    return {"flash-attn": "2.8.3", "flashinfer-python": "0.6.1", "amd-aiter": "0.1.9"}.get(distribution)


def step(block_size: int) -> AttentionMetadata:
    """A prompt, a decode and a chunk, blocks in disorder."""
    lens = [(5, 5), (1, block_size + 3), (4, 2 * block_size)]
    tables = np.array([[3, 0], [1, 5], [4, 2]], np.int32)
    slots = [
        tables[i, at // block_size] * block_size + at % block_size
        for i, (new, total) in enumerate(lens)
        for at in range(total - new, total)
    ]
    query_lens, seq_lens = (np.array(x, np.int32) for x in zip(*lens, strict=True))
    return AttentionMetadata(
        query_lens_S=query_lens,
        seq_lens_S=seq_lens,
        block_tables_SB=tables,
        slot_mapping_T=np.array(slots, np.int32),
    )


@pytest.mark.parametrize(
    ("platform", "backend", "block_size", "spec"),
    [
        ("cuda", "flashinfer", 16, {}),
        ("cuda", "flashinfer", 16, {"sliding_window": 7, "soft_cap": 3.0}),
        ("cuda", "flash_attn", 256, {}),
        ("cuda", "flash_attn", 256, {"sliding_window": 7, "soft_cap": 3.0}),
        ("cuda", "flash_attn", 256, {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)}),
        ("rocm", "aiter", 128, {}),
    ],
)
def test_a_library_is_called_as_it_wants_to_be(
    platform: str, backend: str, block_size: int, spec: dict[str, Any]
) -> None:
    made = make(platform, version=installed, load=LIBRARIES.__getitem__)
    assert backend in made.attention_backends()
    wanted = shape(block_size, **spec)
    ours = made.attention(backend, wanted)
    oracle = ReferenceAttention(wanted, made.allocator, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn((10, n, 16), generator=generator).bfloat16() for n in (4, 2, 2))
    results = []
    for attention in (ours, oracle):
        [cache, _] = attention.allocate(6)
        cache.k.copy_(torch.randn(cache.k.shape, generator=torch.Generator().manual_seed(2)))
        cache.v.copy_(torch.randn(cache.v.shape, generator=torch.Generator().manual_seed(3)))
        results.append(attention.forward(q, k, v, cache, attention.plan(step(block_size))))
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("platform", "backend", "wanted", "reason"),
    [
        ("cuda", "flashinfer", shape(dtype="float32"), "'flashinfer' does not take float32"),
        ("cuda", "flashinfer", shape(alibi_slopes=(1.0,) * 4), "does not take ALiBi slopes of a model's own"),
        ("cuda", "flash_attn", shape(16), r"does not take blocks of 16 tokens \(multiples of 256 only\)"),
        (
            "cuda",
            "flash_attn",
            shape(256, head_size=20),
            r"head size 20 \(multiples of 8 up to 256 only\)",
        ),
        ("cuda", "flash_attn", shape(256, kv_dtype="float8_e5m2"), "does not take a KV cache of float8_e5m2"),
        ("rocm", "aiter", shape(128, num_kv_heads=1, value_size=8), "does not take keys that hold the values"),
    ],
)
def test_a_library_refuses_what_it_cannot(platform: str, backend: str, wanted: AttentionShape, reason: str) -> None:
    made = make(platform, version=installed, load=LIBRARIES.__getitem__)
    with pytest.raises(ConfigError, match=reason):
        made.attention(backend, wanted)


def test_blocks_of_256_are_there_for_flash_attn_alone() -> None:
    assert 256 in make("cuda", version=installed, load=LIBRARIES.__getitem__).capabilities.block_sizes
    assert 256 not in make("cuda").capabilities.block_sizes


def fail(name: str) -> Any:
    raise ImportError(f"{name}_cuda.so: undefined symbol\n  _ZN3c105")


def why(platform: DevicePlatform, name: str) -> str:
    with pytest.raises(ConfigError) as error:
        platform.attention(name, shape())
    assert platform.unavailable_backends()[name] in str(error.value)
    return backend_reason(platform, name.upper())  # as a user may write it


def test_a_library_that_is_not_there_says_why() -> None:
    text = "attention_backend FLASH_ATTN (the package 'flash-attn' is not installed; it has triton, reference; not"
    assert why(make("cuda"), "flash_attn").startswith(text)
    broken = make("cuda", version=installed, load=fail)
    text = "flashinfer-python 0.6.1 cannot be imported: flashinfer_cuda.so: undefined symbol _ZN3c105"
    assert broken.unavailable_backends()["flashinfer"] == text
    old = make("cuda", module=FakeModule(capability=(7, 5)), version=installed)
    text = "flash-attn needs compute capability 8.0, this device has 7.5"
    assert old.unavailable_backends()["flash_attn"] == text
    assert "(the package 'amd-aiter' is not installed; it has" in why(make("rocm"), "aiter")
    card = FakeModule(properties={"gcnArchName": "gfx1100"})
    text = "amd-aiter has kernels for gfx942, gfx950, not for gfx1100"
    assert make("rocm", module=card, version=installed).unavailable_backends()["aiter"] == text
    assert "amd-aiter 0.1.9 cannot be imported" in why(make("rocm", version=installed, load=fail), "aiter")


def test_names_of_other_engines_are_understood() -> None:
    assert EngineConfig.of(attention_backend="FLASHINFER").platform.attention_backend == "FLASHINFER"
    made = make("cuda", version=installed, load=LIBRARIES.__getitem__)
    assert "flashinfer" in [name for name in made.attention_backends() if name.lower() == "FLASHINFER".lower()]


# Intel's extension


def functional(name: str) -> Any:
    assert name == "intel_extension_for_pytorch.llm.functional"
    return SimpleNamespace(
        silu_mul=lambda gate, up: torch.nn.functional.silu(gate) * up,
        rms_norm=lambda x, weight, eps: reference.rms_norm(x, weight, eps),
    )


def test_the_extensions_kernels_are_providers_where_it_fits_torch() -> None:
    platform = make("xpu", version=lambda name: "2.8.10+xpu", torch_build=lambda: XPU_28, load=functional)
    ops = platform.ops()
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.allclose(ops["silu_and_mul"][-1].fn(x), reference.silu_and_mul(x))
    assert torch.equal(ops["rms_norm"][-1].fn(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    assert {ops[op][-1].name for op in ("silu_and_mul", "rms_norm")} == {"ipex"}


@pytest.mark.parametrize(
    ("version", "load", "reason"),
    [
        (lambda name: None, functional, "intel-extension-for-pytorch is not installed"),
        (lambda name: "2.7.1", functional, "intel-extension-for-pytorch 2.7.1 needs torch 2.7, found 2.8.0+xpu"),
        (lambda name: "2.8.10", fail, "it cannot be imported: intel_extension_for_pytorch.llm.functional_cuda.so"),
    ],
)
def test_the_extension_is_left_alone_elsewhere(version: Any, load: Any, reason: str) -> None:
    platform: Any = make("xpu", version=version, torch_build=lambda: XPU_28, load=load)
    assert platform.ipex_reason.startswith(reason)
    assert not any(p.name == "ipex" for providers in platform.ops().values() for p in providers)
