"""Every op of `fairlead.ops.table` as a provider."""

from collections.abc import Callable, Mapping
from typing import Any

from fairlead.interface import OpProvider
from fairlead_triton.elementwise import Elementwise
from fairlead_triton.lora import Lora
from fairlead_triton.matmul import Matmul
from fairlead_triton.moe import Moe
from fairlead_triton.norm import Norms
from fairlead_triton.sampling import Sampling
from fairlead_triton.tuning import Tuning

NAME = "triton"
DTYPES = ("float32", "bfloat16", "float16")


def providers(device: str) -> Mapping[str, tuple[OpProvider, ...]]:
    """The providers of a device, whose key is that of `fairlead_triton.tuning`: "sm_90", "gfx942", "xpu".

    Kernels run on the current device's current stream, and compile when they are first called.
    """
    tuning = Tuning(device)
    norms, elementwise, sampling = Norms(tuning), Elementwise(tuning), Sampling(tuning)
    lora, matmul = Lora(tuning), Matmul(tuning)
    functions: dict[str, Callable[..., Any]] = {
        "embedding": elementwise.embedding,
        "linear": matmul.linear,
        "rms_norm": norms.rms_norm,
        "fused_add_rms_norm": norms.fused_add_rms_norm,
        "gemma_rms_norm": norms.gemma_rms_norm,
        "layer_norm": norms.layer_norm,
        "rotary_embedding": elementwise.rotary_embedding,
        "silu_and_mul": elementwise.silu_and_mul,
        "gelu_and_mul": elementwise.gelu_and_mul,
        "moe": Moe(tuning).moe,
        "lora_shrink": lora.lora_shrink,
        "lora_expand": lora.lora_expand,
        "apply_token_bitmask": sampling.apply_token_bitmask,
        "apply_penalties": sampling.apply_penalties,
        "draw": sampling.draw,
        "draw_filtered": sampling.draw_filtered,
    }
    return {name: (OpProvider(name=NAME, fn=fn, refuses=_refuses),) for name, fn in functions.items()}


def _refuses(dtype: str) -> str | None:
    return None if dtype in DTYPES else f"the kernels compute in {', '.join(DTYPES)}, not {dtype}"
