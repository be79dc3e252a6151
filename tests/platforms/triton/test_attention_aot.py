"""The attention kernels, compiled for devices that are not here at the tile sizes that they would have there."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from aot import SHARED_BYTES, TARGETS, Case, compile_cases
from aot_record import recorded

from fairlead.interface import AttentionShape, AttentionSpec
from fairlead.ops.memory import PooledAllocator
from fairlead_triton.attention import tiles
from fairlead_triton.attention.backend import TritonAttention

KINDS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"heads": (32, 8), "head_size": 128},
    "small": {"heads": (32, 8), "head_size": 64, "block_size": 64},
    "gemma": {"heads": (8, 4), "head_size": 256, "soft_cap": 50.0, "sliding_window": 4096},
    "alibi": {"heads": (32, 32), "head_size": 80, "alibi_slopes": (0.5,) * 32, "dtype": "float16"},
    "latent": {"heads": (16, 1), "head_size": 576, "value_size": 512, "block_size": 64},
    "fp8": {"heads": (32, 8), "head_size": 128, "kv_dtype": "fp8_e4m3", "kv_scales": None},
    "float32": {"heads": (32, 8), "head_size": 128, "dtype": "float32"},
}
LAUNCHES = ("prompt", "decode", "merge", "write", "rotary_write")
QUICK = (("sm_90", "attention.kernels:merge_kernel:llama"), ("gfx942", "attention.kernels:merge_kernel:llama"))
CASES = [
    (shape, launch)
    for shape in SHAPES
    for launch in LAUNCHES
    if launch in ("prompt", "decode") or shape in ("llama", "latent", "fp8")
    if not (launch == "rotary_write" and shape == "latent")
]
# What is known to spill, in bytes (sm) or registers (gfx): latent attention keeps 512 results of a row, ptxas leaves a
# few bytes on the stack to fit one more program on a processor, and RDNA 3 holds every operand of its own twice.
# Nothing else may.
SPILLS = {
    ("sm_80", "gemma"): 32,
    ("sm_90", "latent"): 256,
    ("sm_100", "latent"): 80,
    ("gfx950", "latent"): 8,
    ("gfx1100", "small"): 48,
    ("gfx1100", "gemma"): 160,
    ("gfx1100", "alibi"): 32,
    ("gfx1100", "latent"): 480,
    ("gfx1100", "fp8"): 112,
}


def make_backend(
    target: str, *, heads: tuple[int, int], head_size: int, block_size: int = 16, dtype: str = "bfloat16",
    kv_dtype: str = "auto", kv_scales: tuple[float, float] | None = (1.0, 1.0), **kind: Any,
) -> TritonAttention:  # fmt: skip
    spec = AttentionSpec(num_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, scale=0.1, **kind)
    shape = AttentionShape(spec=spec, num_layers=1, block_size=block_size, dtype=dtype)
    memory = PooledAllocator(lambda size, dtype: torch.empty(size, dtype=dtype))
    traits = tiles.traits_of(target, num_processors=100)
    return TritonAttention(
        shape,
        memory,
        torch.device("cpu"),
        kv_dtype=kv_dtype,
        kv_scales=kv_scales,
        traits=traits,
        tuning=tiles.tuned(target),
    )


def case(target: str, shape: str, launch: str) -> Case:
    """A launch as the backend makes it, on views whose rows are aligned."""
    backend = make_backend(target, **SHAPES[shape])
    options = dict(getattr(backend._options, launch))
    model = "*" + KINDS[backend.shape.dtype]
    stored = model if backend.kv_dtype == "auto" else "*u8"
    numbers = dict.fromkeys(("qk_scale", "v_scale", "inverse_k_scale", "inverse_v_scale"), "fp32")
    types = {
        **dict.fromkeys(("out", "q", "k", "v", "q_out", "cos", "sin"), model), **numbers,
        **dict.fromkeys(("scales", "slopes", "partials", "partial_ml"), "*fp32"),
        "cache": stored, "words": "*i32", "positions": "*i64",
    }  # fmt: skip
    module = "kv_write" if "write" in launch else "kernels"
    name = {"write": "kv_write", "rotary_write": "rotary_kv_write"}.get(launch, launch) + "_kernel"
    names = arguments(module, name)
    if launch == "rotary_write":
        options |= {"R": backend.spec.head_size, "INTERLEAVED": False}
    num_warps = options.pop("num_warps", 4)
    signature = {n: types.get(n, "i32") for n in names if n not in options}
    aligned = tuple(n for n in signature if signature[n][0] == "*" or "stride" in n)
    return Case(
        kernel=f"fairlead_triton.attention.{module}:{name}", signature=signature, constexprs=options,
        num_warps=num_warps, aligned=aligned, label=shape, max_spills={target: SPILLS.get((target, shape), 0)},
    )  # fmt: skip


def arguments(module: str, name: str) -> list[str]:
    from fairlead_triton.attention import kernels, kv_write

    return list(getattr({"kernels": kernels, "kv_write": kv_write}[module], name).arg_names)


def cases_of(target: str) -> list[Case]:
    return [case(target, shape, launch) for shape, launch in CASES]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("shape", "launch"), CASES)
def test_it_compiles_and_fits(target: str, shape: str, launch: str) -> None:
    asked = case(target, shape, launch)
    recorded(target, asked).check(asked)


@pytest.mark.timeout(3600)
def test_the_compilers_say_what_is_recorded(full: bool) -> None:
    """All × all at the full count; else one for each vendor."""
    wanted = [(t, c) for t in TARGETS for c in cases_of(t) if full or (t, c.name) in QUICK]
    assert len(wanted) >= len(QUICK)
    found = compile_cases(wanted)
    for target, asked in wanted:
        assert replace(found[target, asked.name], seconds=0.0) == recorded(target, asked)


@pytest.mark.parametrize("target", TARGETS)
def test_targets_have_the_shared_memory_that_is_known(target: str) -> None:
    assert tiles.traits_of(target, num_processors=1).shared_memory_bytes == SHARED_BYTES[target]


def test_the_widest_tiles_are_for_the_widest_instructions() -> None:
    """What the speed on an H200 rests on; a change of the lists should not lose it unnoticed."""
    hopper = make_backend("sm_90", **SHAPES["llama"]).tiles
    assert (hopper.prompt_rows, hopper.prompt_keys, hopper.prompt_warps) == (128, 128, 8)
    assert (hopper.decode_rows, hopper.decode_keys, hopper.decode_warps) == (16, 64, 4)
    unknown = tiles.traits_of("sm_75", num_processors=1)
    assert not unknown.async_copies
    assert tiles.traits_of("a name of tomorrow", num_processors=7) == tiles.DeviceTraits(num_processors=7)
