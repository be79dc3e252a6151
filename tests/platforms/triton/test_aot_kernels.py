"""Every kernel compiles for every target as its caller launches it there, fits and spills nothing.

The launches are the callers' own: kernels are replaced by what records their arguments, so that block sizes are those
of the tuning table. Nothing is computed; tensors are of the device "meta".
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from aot import TARGETS, Case, compile_cases
from aot_record import recorded

from fairlead.interface import MoeSpec
from fairlead_triton.elementwise import Elementwise
from fairlead_triton.kernels import elementwise, lora, matmul, moe, norm, quantise, sampling
from fairlead_triton.linear import fp8_dtype
from fairlead_triton.lora import Lora
from fairlead_triton.matmul import INT4_HALF, Matmul
from fairlead_triton.moe import Moe
from fairlead_triton.norm import Norms
from fairlead_triton.quantise import Quantised, RowQuantiser
from fairlead_triton.sampling import Sampling
from fairlead_triton.tuning import Tuning

MODULES = (elementwise, lora, matmul, moe, norm, quantise, sampling)
NEVER_SPECIALISED = ("num_rows", "max_tiles", "num_places")
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e4m3fnuz: "fp8e4b8",
}
# Numbers of 4 bits are widened in registers, of which gfx1100 has 256 for its sums too: it spills 10 of them, and with
# other tiles up to 700. For sm_100 ptxas leaves 32 bytes on the stack to fit another program on a processor.
MAX_SPILLS: Mapping[str, Mapping[str, int]] = {
    "int4_small": {"gfx1100": 16},
    "int4_large": {"gfx1100": 16},
    "skinny_wide": {"sm_100": 32},
}

E, F, V, D = 4096, 14336, 128256, 128
BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(tuning: Tuning) -> dict[str, Callable[[], object]]:
    """What to call, by name: the shapes of models of 8 billion weights, each kernel in each of its ways."""
    norms, ew, draws = Norms(tuning), Elementwise(tuning), Sampling(tuning)
    adapters, products, quantiser = Lora(tuning), Matmul(tuning), RowQuantiser(tuning)
    x, w, adapter_N = meta(64, E), meta(E), meta(64, dtype=I64)
    probs = meta(64, V, dtype=F32)
    fp8 = fp8_dtype(tuning.device)
    calls: dict[str, Callable[[], object]] = {
        "rms_norm": lambda: norms.rms_norm(x, w, 1e-5),
        "rms_norm_heads": lambda: norms.rms_norm(meta(64, 32, D), meta(D), 1e-5),
        "rms_norm_wide_float32": lambda: norms.rms_norm(meta(64, 16384, dtype=F32), meta(16384, dtype=F32), 1e-5),
        "gemma_rms_norm": lambda: norms.gemma_rms_norm(x, w, 1e-5),
        "fused_add_rms_norm": lambda: norms.fused_add_rms_norm(x, x, w, 1e-5),
        "layer_norm": lambda: norms.layer_norm(x, w, w, 1e-5),
        "rms_norm_int8": lambda: norms.rms_norm_quantised(x, w, 1e-5, torch.int8),
        "fused_add_rms_norm_fp8": lambda: norms.fused_add_rms_norm_quantised(x, x, w, 1e-5, torch.float8_e4m3fn),
        "layer_norm_fp8": lambda: norms.layer_norm_quantised(x, w, None, 1e-5, torch.float8_e4m3fnuz),
        "quantise_int8": lambda: quantiser(x, torch.int8),
        "quantise_fp8": lambda: quantiser(x, torch.float8_e4m3fn),
        "silu": lambda: ew.silu_and_mul(meta(64, 2 * F)),
        "gelu": lambda: ew.gelu_and_mul(meta(64, 2 * F)),
        "rotary": lambda: rotate(ew, interleaved=False),
        "rotary_interleaved": lambda: rotate(ew, interleaved=True),
        "embedding": lambda: ew.embedding(adapter_N, meta(V, E)),
        "copy_blocks": lambda: ew.copy_blocks(
            [meta(64, 16, 8, D)] * 3, [meta(64, 16, 8, D)] * 3, meta(4, 2, dtype=I64)
        ),
        "penalties": lambda: draws.apply_penalties(
            probs, meta(99, dtype=I64), *(meta(99, dtype=F32) for _ in range(3))
        ),
        "bitmask": lambda: draws.apply_token_bitmask(probs, meta(64, V // 32, dtype=torch.int32)),
        "draw": lambda: draws.draw(probs, meta(64, dtype=torch.float64)),
        "draw_filtered": lambda: draws.draw_filtered(probs, meta(4, 64, dtype=torch.float64), 50),
        "lora_shrink": lambda: adapters.lora_shrink(x, meta(9, 16, E), adapter_N),
        "lora_expand": lambda: adapters.lora_expand(x, meta(64, 16, dtype=F32), meta(9, E, 16), adapter_N),
        "skinny": lambda: products.linear(meta(8, E), meta(E, E), meta(E)),
        "skinny_wide": lambda: products.linear(meta(8, E), meta(V, E), None),
        "skinny_float32": lambda: products.linear(meta(8, E, dtype=F32), meta(E, E, dtype=F32), None),
        "moe_small": lambda: experts(Moe(tuning), 8, BF16, MoeSpec(num_experts=64, top_k=6)),
        "moe_large": lambda: experts(Moe(tuning), 512, BF16, MoeSpec(num_experts=256, top_k=8, scoring="sigmoid")),
        "moe_float32": lambda: experts(
            Moe(tuning), 512, F32, MoeSpec(num_experts=256, top_k=8, num_groups=8, top_groups=4, group_top=2)
        ),
    }
    for size, num_rows in (("small", 8), ("large", 512)):
        kinds = {"int8": torch.int8} | ({} if fp8 is None else {"fp8": fp8})
        for kind, dtype in kinds.items():
            calls[f"{kind}_{size}"] = eight_bit(products, num_rows, dtype)
        calls[f"int4_{size}"] = int4(products, num_rows, BF16)
    return calls


def rotate(ew: Elementwise, *, interleaved: bool) -> None:
    q, k, _ = meta(64, 48 * D).split([32 * D, 8 * D, 8 * D], dim=-1)
    table = meta(8192, D)
    ew.rotary_embedding(q.view(64, 32, D), k.view(64, 8, D), meta(64, dtype=I64), table, table, interleaved)


def experts(op: Moe, num_tokens: int, dtype: torch.dtype, spec: MoeSpec) -> None:
    x, logits = meta(num_tokens, 2048, dtype=dtype), meta(num_tokens, spec.num_experts, dtype=dtype)
    correction = meta(spec.num_experts, dtype=F32) if spec.scoring == "sigmoid" else None
    gate_up = meta(spec.num_experts, 2 * 1408, 2048, dtype=dtype)
    op.moe(x, logits, correction, gate_up, meta(spec.num_experts, 2048, 1408, dtype=dtype), spec)


def eight_bit(products: Matmul, num_rows: int, dtype: torch.dtype) -> Callable[[], object]:
    rows = Quantised(values=meta(num_rows, E, dtype=dtype), scales=meta(num_rows, dtype=F32))
    return lambda: products.eight_bit(rows, meta(F, E, dtype=dtype), meta(F, dtype=F32), meta(F), BF16)


def int4(products: Matmul, num_rows: int, dtype: torch.dtype) -> Callable[[], object]:
    weight, scales = meta(F, E // 2, dtype=torch.uint8), meta(F, E // 2 // INT4_HALF, dtype=F32)
    return lambda: products.int4(meta(num_rows, E, dtype=dtype), weight, scales, None)


class Recorder:
    """Stands for a kernel: takes a launch and turns it into the case that a device would compile for it."""

    def __init__(self, module: ModuleType, name: str, cases: list[Case]) -> None:
        self._kernel, self._names, self._cases = f"{module.__name__}:{name}", getattr(module, name).arg_names, cases

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(0 < size < 2**31 for size in grid)
        assert all(size < 65536 for size in grid[1:])
        return self._launch

    def _launch(self, *args: Any, num_warps: int, num_stages: int = 2, **constexprs: Any) -> None:
        signature, aligned = {}, []
        values = dict(constexprs)
        for name, arg in zip(self._names, args, strict=False):
            if isinstance(arg, torch.Tensor):
                signature[name] = f"*{TYPES[arg.dtype]}"
                aligned.append(name)
            elif arg is None or (arg == 1 and name not in NEVER_SPECIALISED and not isinstance(arg, float)):
                values[name] = arg
            elif isinstance(arg, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -(2**31) <= arg < 2**31 else "i64"
                if arg % 16 == 0 and name not in NEVER_SPECIALISED:
                    aligned.append(name)
        self._cases.append(
            Case(
                kernel=self._kernel,
                signature=signature,
                constexprs=values,
                num_warps=num_warps,
                num_stages=num_stages,
                aligned=tuple(aligned),
            )
        )


def cases_of(target: str) -> Iterator[tuple[str, Case]]:
    """(name of the launch, case) of each different kernel that is launched on a target."""
    cases: list[Case] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES:
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                patch.setattr(module, name, Recorder(module, name, cases))
        for label, call in launches(Tuning(target)).items():
            seen = len(cases)
            call()
            assert len(cases) > seen, label
            for case in cases[seen:]:
                yield label, Case(**{**_fields(case), "label": label, "max_spills": MAX_SPILLS.get(label, {})})


def _fields(case: Case) -> dict[str, Any]:
    return {name: getattr(case, name) for name in Case.__dataclass_fields__}


def unique(target: str) -> list[Case]:
    """Different cases of a target, those of one name (the two products of an expert) told apart."""
    found: dict[str, Case] = {}
    for label, case in cases_of(target):
        is_new = all({**_fields(case), "label": ""} != {**_fields(other), "label": ""} for other in found.values())
        if is_new:
            number = sum(
                other.kernel == case.kernel and other.label.startswith(label + "#") for other in found.values()
            )
            named = Case(**{**_fields(case), "label": f"{label}#{number}"})
            found[named.name] = named
    return list(found.values())


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile(target: str) -> None:
    faults = []
    for case in unique(target):
        try:
            recorded(target, case).check(case)
        except AssertionError as error:
            faults.append(str(error))
    assert not faults, "\n".join(faults)


@pytest.mark.timeout(3600)
def test_the_compilers_say_what_is_recorded(full: bool) -> None:
    """All × all at the full count; else another case for each target."""
    wanted: list[tuple[str, Case]] = []
    for i, target in enumerate(TARGETS):
        cases = unique(target)
        wanted += [(target, case) for case in (cases if full else [cases[i * len(cases) // len(TARGETS)]])]
    found = compile_cases(wanted)
    for target, case in wanted:
        assert replace(found[target, case.name], seconds=0.0) == recorded(target, case)


def test_every_kernel_is_launched() -> None:
    """And fp8 where a target multiplies it, so that no kernel goes without a compile."""
    kernels = {f"{m.__name__}:{name}" for m in MODULES for name in vars(m) if name.endswith("_kernel")}
    for target in TARGETS:
        cases = unique(target)
        assert {case.kernel for case in cases} == kernels
        has_fp8 = any(case.label.startswith("fp8_") for case in cases)
        assert has_fp8 == (target not in ("sm_80", "gfx90a", "gfx1100"))
