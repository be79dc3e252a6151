"""Arguments of each op, in odd shapes: what the tier `ops` calls references and providers with.

Shapes: N rows, E model width, F feed-forward width, V vocabulary, H query heads, K kv-heads, D head size, P positions,
X experts, W words of a bitmask.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fairlead.interface import MoeSpec

WIDTHS, MORE_WIDTHS = (64, 96), (80, 128, 320, 576)
ROWS, MORE_ROWS = (0, 1, 7, 33), (2, 16, 64, 129)
HEADS = ((4, 2, 64), (3, 1, 80))  # query heads, kv-heads, head size


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """One call: float tensors in float32, on the host, to be rounded to a dtype, but for those of the names `exact`.

    `rows` names those that may be strided views of wider ones, `written` the one that the op changes in place of
    returning a result.
    """

    values: Mapping[str, Any]
    rows: tuple[str, ...]
    where: str
    exact: tuple[str, ...] = ()
    written: str | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.values.items() if isinstance(value, torch.Tensor)}

    def mapped(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> "Arguments":
        """With each tensor changed."""
        changed = {n: change(n, v) if isinstance(v, torch.Tensor) else v for n, v in self.values.items()}
        return replace(self, values=changed)


def of(op: str, row_counts: Sequence[int], widths: Sequence[int]) -> Iterator[Arguments]:
    """The calls of an op."""
    for num_rows in row_counts:
        for width in widths:
            generator = torch.Generator().manual_seed(1000 * num_rows + width)
            yield from MAKERS[op](generator, num_rows, width)


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * scale


def _norm_weight(generator: torch.Generator, width: int) -> torch.Tensor:
    return 1 + _normal(generator, width, scale=0.1)


def _embedding(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    ids = torch.randint(0, 131, (n,), generator=g)
    weight = _normal(g, 131, width)
    yield Arguments(values={"token_ids_T": ids, "weight_VE": weight}, rows=(), where=f"{n} tokens of width {width}")


def _linear(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    for num_outputs, has_bias in ((48, False), (131, True)):
        values = {
            "x": _normal(g, n, width),
            "weight": _normal(g, num_outputs, width, scale=width**-0.5),
            "bias": _normal(g, num_outputs) if has_bias else None,
        }
        yield Arguments(values=values, rows=("x",), where=f"{n} rows, {width} to {num_outputs}")


def _rms_norm(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    values = {"x_NE": _normal(g, n, width, scale=3), "weight_E": _norm_weight(g, width), "eps": 1e-5}
    yield Arguments(values=values, rows=("x_NE",), where=f"{n} rows of {width}")


def _fused_add_rms_norm(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    values = {
        "x_NE": _normal(g, n, width),
        "residual_NE": _normal(g, n, width, scale=3),
        "weight_E": _norm_weight(g, width),
        "eps": 1e-5,
    }
    yield Arguments(values=values, rows=("x_NE", "residual_NE"), where=f"{n} rows of {width}")


def _gemma_rms_norm(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    values = {"x_NE": _normal(g, n, width, scale=3), "weight_E": _normal(g, width, scale=0.1), "eps": 1e-6}
    yield Arguments(values=values, rows=("x_NE",), where=f"{n} rows of {width}")


def _layer_norm(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    for has_bias in (False, True):
        bias = _normal(g, width) if has_bias else None
        values = {
            "x_NE": _normal(g, n, width, scale=3),
            "weight_E": _norm_weight(g, width),
            "bias_E": bias,
            "eps": 1e-5,
        }
        yield Arguments(values=values, rows=("x_NE",), where=f"{n} rows of {width}, bias {has_bias}")


def _rotary_embedding(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    for (heads, kv_heads, size), interleaved in zip(HEADS, (False, True), strict=True):
        angles = torch.rand(41, size // 2, generator=g) * 6.28
        both = angles.repeat_interleave(2, -1) if interleaved else angles.repeat(1, 2)
        values = {
            "q_THD": _normal(g, n, heads, size),
            "k_TKD": _normal(g, n, kv_heads, size),
            "positions_T": torch.randint(0, 41, (n,), generator=g),
            "cos_PD": both.cos(),
            "sin_PD": both.sin(),
            "interleaved": interleaved,
        }
        where = f"{n} tokens, {heads} and {kv_heads} heads of {size}, interleaved {interleaved}"
        yield Arguments(values=values, rows=("q_THD", "k_TKD"), where=where)


def _gated(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    yield Arguments(values={"x_N2F": _normal(g, n, 2 * width)}, rows=("x_N2F",), where=f"{n} rows of 2 x {width}")


def _moe(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    if n == 0:  # no step has no token, and a layer's experts are only ever called with a step's tokens
        return
    num_experts, inner = 4, 32
    specs = (
        MoeSpec(num_experts=4, top_k=2, normalize=True),
        MoeSpec(num_experts=4, top_k=1, scoring="sigmoid", scale=1.5, num_groups=2, top_groups=1),
    )
    for spec in specs:
        values = {
            "x_TE": _normal(g, n, width),
            "logits_TX": _normal(g, n, num_experts, scale=2),
            "correction_X": None if spec.scoring == "softmax" else _normal(g, num_experts, scale=0.1),
            "gate_up_X2FE": _normal(g, num_experts, 2 * inner, width, scale=width**-0.5),
            "down_XEF": _normal(g, num_experts, width, inner, scale=inner**-0.5),
            "spec": spec,
        }
        yield Arguments(values=values, rows=("x_TE",), where=f"{n} tokens of {width}, {spec.scoring}, top {spec.top_k}")


def _apply_token_bitmask(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    for vocab_size, num_words in ((96, 3), (131, 6)):
        words = torch.randint(-(2**31), 2**31, (n, num_words), generator=g, dtype=torch.int64).to(torch.int32)
        values = {"logits_SV": _normal(g, n, vocab_size), "bitmask_SW": words}
        yield Arguments(values=values, rows=("logits_SV",), where=f"{n} rows of {vocab_size}, {num_words} words")


def _lora_shrink(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    values = {
        "x_NI": _normal(g, n, width),
        "a_LRI": _adapters(g, 3, 8, width),
        "adapter_N": torch.randint(0, 3, (n,), generator=g),
    }
    yield Arguments(values=values, rows=("x_NI",), where=f"{n} rows of {width}, 3 adapters of rank 8")


def _lora_expand(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    values = {
        "y_NO": _normal(g, n, width),
        "h_NR": _normal(g, n, 8),
        "b_LOR": _adapters(g, 3, width, 8),
        "adapter_N": torch.randint(0, 3, (n,), generator=g),
    }
    yield Arguments(values=values, rows=("y_NO",), where=f"{n} rows of {width}, 3 adapters of rank 8", exact=("h_NR",))


def _adapters(g: torch.Generator, num: int, rows: int, columns: int) -> torch.Tensor:
    """Adapter 0 is all zeros."""
    drawn = _normal(g, num, rows, columns, scale=columns**-0.5)
    drawn[0] = 0
    return drawn


def _apply_penalties(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    if n == 0:  # nobody samples, so nothing is called; the same for the draws
        return
    num_places = 3 * n
    values = {
        "logits_SV": _normal(g, n, 131, scale=3),
        "index_N": torch.randperm(n * 131, generator=g)[:num_places],
        "repetition_N": 0.5 + torch.rand(num_places, generator=g),
        "frequency_N": torch.rand(num_places, generator=g),
        "presence_N": torch.rand(num_places, generator=g),
    }
    values["logits_SV"].view(-1)[values["index_N"][0]] = -torch.inf
    yield Arguments(values=values, rows=(), where=f"{n} rows of 131", exact=tuple(values), written="logits_SV")


def _draw(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    if n == 0:
        return
    values = {
        "probs_RV": _normal(g, n, 131, scale=2).softmax(-1),
        "uniform_R": torch.rand(n, generator=g, dtype=torch.float64),
    }
    yield Arguments(values=values, rows=(), where=f"{n} rows of 131", exact=tuple(values))


def _draw_filtered(g: torch.Generator, n: int, width: int) -> Iterator[Arguments]:
    if n == 0:
        return
    choices = torch.tensor([[0, 1, 5, 200], [1, 0.9, 0.5, 0.05], [0, 0.1, 0.02, 0.5]], dtype=torch.float64)
    picked = [row[torch.randint(0, 4, (n,), generator=g)] for row in choices]
    settings = torch.stack([*picked, torch.rand(n, generator=g, dtype=torch.float64)])
    probs = _normal(g, n, 131, scale=2).softmax(-1)
    values = {"probs_RV": probs, "settings_4R": settings, "max_top_k": 5 if 5 in picked[0] else int(1 in picked[0])}
    yield Arguments(values=values, rows=(), where=f"{n} rows of 131", exact=tuple(values))


MAKERS: dict[str, Callable[[torch.Generator, int, int], Iterator[Arguments]]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _rms_norm,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "gemma_rms_norm": _gemma_rms_norm,
    "layer_norm": _layer_norm,
    "rotary_embedding": _rotary_embedding,
    "silu_and_mul": _gated,
    "gelu_and_mul": _gated,
    "moe": _moe,
    "apply_token_bitmask": _apply_token_bitmask,
    "lora_shrink": _lora_shrink,
    "lora_expand": _lora_expand,
    "apply_penalties": _apply_penalties,
    "draw": _draw,
    "draw_filtered": _draw_filtered,
}
"""By op; the calls for so many rows of such a width."""
