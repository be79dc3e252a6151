"""Mixture of experts against its reference: every way of routing, and products at odd sizes."""

from dataclasses import replace

import pytest
import torch

from fairlead.interface import MoeSpec
from fairlead.ops import reference
from fairlead.ops.table import TOLERANCE
from fairlead_triton.moe import Moe
from fairlead_triton.tuning import Tuning, read_table

TINY = """
[moe_order.default]
block = 16
num_warps = 1
sum_block = 32
[moe_matmul_small.default]
block_m = 16
block_n = 16
block_k = 16
num_warps = 1
num_stages = 1
[moe_matmul.default]
small_tokens = 8
block_m = 32
block_n = 32
block_k = 32
num_warps = 1
num_stages = 1
"""
SHORT = Moe(Tuning("sm_90", read_table({"tiny.toml": TINY})))
OPS = Moe(Tuning("sm_90"))

SPECS = [
    MoeSpec(num_experts=8, top_k=2),
    MoeSpec(num_experts=7, top_k=3, normalize=True, scale=2.5),
    MoeSpec(num_experts=1, top_k=1, scoring="sigmoid"),
    MoeSpec(num_experts=12, top_k=4, num_groups=4, top_groups=2, normalize=True),
    MoeSpec(num_experts=15, top_k=5, scoring="sigmoid", num_groups=5, top_groups=2, group_top=2, normalize=True),
    MoeSpec(num_experts=16, top_k=16, scoring="sigmoid", scale=0.5),
]


def random(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("has_correction", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_routing(spec: MoeSpec, has_correction: bool, device: torch.device) -> None:
    dtype = torch.float32 if has_correction else torch.bfloat16
    logits = random(4, spec.num_experts, seed=0).to(dtype).to(device)
    # Equal scores may be taken in any order: bfloat16's few values are told apart by the column.
    logits += (torch.arange(spec.num_experts, device=device) * 0.03125).to(dtype)
    correction = random(spec.num_experts, seed=1, scale=0.3).to(device) if has_correction else None
    weights, experts = OPS.route(logits, correction, spec)
    expected_weights, expected_experts = reference.route_tokens(logits, correction, spec)
    order, expected_order = experts.argsort(-1), expected_experts.argsort(-1)
    assert torch.equal(experts.gather(1, order).long(), expected_experts.gather(1, expected_order))
    torch.testing.assert_close(weights.gather(1, order), expected_weights.gather(1, expected_order))


def test_equal_experts_rank_by_number(device: torch.device) -> None:
    _, experts = OPS.route(torch.zeros((2, 6), device=device), None, MoeSpec(num_experts=6, top_k=3))
    assert experts.tolist() == [[0, 1, 2]] * 2


def test_routing_of_what_is_no_number_stays_among_the_experts(device: torch.device) -> None:
    _, experts = OPS.route(torch.full((2, 6), torch.nan, device=device), None, MoeSpec(num_experts=6, top_k=3))
    assert ((experts >= 0) & (experts < 6)).all()


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_moe(num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    spec = MoeSpec(num_experts=5, top_k=2, normalize=True)
    width, inner = 37, 18
    x = random(num_tokens, width + 5, seed=0).to(dtype).to(device)[:, 3:-2]
    logits = random(num_tokens, spec.num_experts, seed=1).to(device)
    gate_up = random(spec.num_experts, 2 * inner, width, seed=2, scale=0.1).to(dtype).to(device)
    down = random(spec.num_experts, inner, width, seed=3, scale=0.1).to(dtype).to(device).transpose(1, 2)
    got = SHORT.moe(x, logits, None, gate_up, down, spec)
    assert got.shape == x.shape
    assert got.dtype == dtype
    if num_tokens:
        expected = reference.moe(x.float(), logits, None, gate_up.float(), down.float(), spec)
        bound = TOLERANCE[str(dtype).removeprefix("torch.")]
        torch.testing.assert_close(got.float(), expected, atol=bound, rtol=bound)


def test_moe_with_the_packages_own_settings(device: torch.device) -> None:
    spec = MoeSpec(num_experts=3, top_k=2, scoring="sigmoid")
    x, logits = random(3, 130, seed=0).to(device), random(3, spec.num_experts, seed=1).to(device)
    correction = random(spec.num_experts, seed=4, scale=0.1).to(device)
    gate_up = random(spec.num_experts, 140, 130, seed=2, scale=0.1).to(device)
    down = random(spec.num_experts, 130, 70, seed=3, scale=0.1).to(device)
    got = OPS.moe(x, logits, correction, gate_up, down, spec)
    expected = reference.moe(x, logits, correction, gate_up, down, spec)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_all_tokens_to_one_expert_and_tokens_of_a_smaller_batch(device: torch.device) -> None:
    """18 rows in tiles of 32, then 11 of them, in the same tiles: the same bits."""
    spec = replace(SPECS[0], top_k=1)
    x, gate_up = random(18, 20, seed=0).to(device), random(8, 32, 20, seed=2, scale=0.1).to(device)
    down, logits = random(8, 20, 16, seed=3, scale=0.1).to(device), torch.zeros((18, 8), device=device)
    logits[:, 5] = 9.0
    whole = SHORT.moe(x, logits, None, gate_up, down, spec)
    torch.testing.assert_close(whole, reference.moe(x, logits, None, gate_up, down, spec), atol=1e-5, rtol=1e-5)
    logits[:7] = random(7, 8, seed=5).to(device)
    fewer = SHORT.moe(x[7:], logits[7:], None, gate_up, down, spec)
    assert torch.equal(SHORT.moe(x, logits, None, gate_up, down, spec)[7:], fewer)
