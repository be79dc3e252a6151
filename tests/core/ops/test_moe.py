"""The op `moe` against one token and one expert at a time, and its routing against the papers' words."""

import pytest
import torch
from torch.nn import functional

from fairlead.interface import MoeSpec
from fairlead.ops import reference

SPECS = {
    "switch": MoeSpec(num_experts=6, top_k=1),
    "mixtral": MoeSpec(num_experts=6, top_k=2, normalize=True),
    "all": MoeSpec(num_experts=6, top_k=6),
    "groups": MoeSpec(num_experts=6, top_k=3, num_groups=3, top_groups=2, scale=1.5),
    "balanced": MoeSpec(
        num_experts=6, top_k=2, scoring="sigmoid", normalize=True, scale=2.5, num_groups=3, top_groups=1, group_top=2
    ),
}


def one_token(x_E: torch.Tensor, logits_X: torch.Tensor, correction_X: torch.Tensor, spec: MoeSpec) -> dict[int, float]:
    """Weight by expert, spelled out."""
    scores = (logits_X.softmax(0) if spec.scoring == "softmax" else logits_X.sigmoid()).tolist()
    choice = [s + c for s, c in zip(scores, correction_X.tolist(), strict=True)]
    size = spec.num_experts // spec.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(spec.num_groups)]
    groups.sort(key=lambda g: -sum(sorted((choice[e] for e in g), reverse=True)[: spec.group_top]))
    allowed = [e for g in groups[: spec.top_groups] for e in g]
    chosen = sorted(allowed, key=lambda e: -choice[e])[: spec.top_k]
    total = sum(scores[e] for e in chosen) if spec.normalize else 1.0
    return {e: scores[e] / total * spec.scale for e in chosen}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("num_tokens", [1, 17])
def test_moe_equals_one_token_at_a_time(name: str, num_tokens: int) -> None:
    spec, size, width = SPECS[name], 8, 12
    generator = torch.Generator().manual_seed(num_tokens)
    x, logits, correction, gate_up, down = (
        torch.empty(shape).normal_(generator=generator)
        for shape in ((num_tokens, size), (num_tokens, 6), (6,), (6, 2 * width, size), (6, size, width))
    )
    if spec.scoring == "softmax":
        correction.zero_()
    expected = torch.zeros_like(x)
    for t in range(num_tokens):
        for expert, weight in one_token(x[t], logits[t], correction, spec).items():
            gate, up = (gate_up[expert] @ x[t]).chunk(2)
            expected[t] += weight * (down[expert] @ (functional.silu(gate) * up))
    given = correction if spec.scoring == "sigmoid" else None
    before = x.clone()
    torch.testing.assert_close(reference.moe(x, logits, given, gate_up, down, spec), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(x, before)
    assert reference.moe(x.bfloat16(), logits, given, gate_up.bfloat16(), down.bfloat16(), spec).dtype == torch.bfloat16
