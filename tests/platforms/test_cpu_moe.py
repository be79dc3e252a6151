"""Native experts, by every instruction set that this machine can run, against the same method's layers one by one."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fairlead.interface import UNQUANTIZED, ExpertsMethod, LinearShape, MoeSpec
from fairlead.ops import reference
from fairlead.ops.linear import TOLERANCE
from fairlead_cpu import native, topology
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.linear import NativeLinear
from fairlead_cpu.moe import PackedExperts
from fairlead_cpu.recorder import StepRecorder

SCHEMES = (UNQUANTIZED, "int8", "int4")
DTYPES = ("float32", "bfloat16")
SPECS = {
    "best one": MoeSpec(num_experts=5, top_k=1),
    "two, normalised": MoeSpec(num_experts=8, top_k=2, normalize=True),
    "all": MoeSpec(num_experts=3, top_k=3, normalize=True, scale=2.5),
    "eight": MoeSpec(num_experts=33, top_k=8),
    "groups by one": MoeSpec(num_experts=8, top_k=3, num_groups=4, top_groups=2),
    "groups by two": MoeSpec(
        num_experts=8, top_k=2, scoring="sigmoid", normalize=True, num_groups=2, top_groups=1, group_top=2, scale=1.5
    ),
}
# Tokens, model width, expert width: one token, rows beside whole tiles, widths beside whole panels and blocks.
SIZES = [(2, 65, 17), (70, 130, 33), (1, 64, 32), (13, 96, 40)]

pytestmark = pytest.mark.skipif(not native.usable(), reason="fairlead-cpu was built without kernels")


@pytest.fixture(scope="module", params=native.usable())
def kernels(request: pytest.FixtureRequest) -> Iterator[native.Kernels]:
    """The library of one instruction set, with three threads whatever the machine has."""
    kernels = native.Kernels(request.param, topology.Layout(cpus=(-1, -1, -1), bound=False, reason="test"))
    yield kernels
    kernels.call.fl_pool_shutdown()


class Case:
    """Experts of one method, packed by it, and their weights."""

    def __init__(
        self, kernels: native.Kernels, scheme: str, dtype: str, spec: MoeSpec, size: tuple[int, int, int]
    ) -> None:
        self.spec, self.generator = spec, torch.Generator().manual_seed(sum(size))
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.allocator = HostAllocator()
        self.method = NativeLinear(scheme, kernels, self.allocator)
        self.num_tokens, E, F = size
        self.gate_up = self.draw(spec.num_experts, 2 * F, E) * E**-0.5
        self.down = self.draw(spec.num_experts, E, F) * F**-0.5
        self.shapes = [LinearShape(in_features=i, out_features=o, dtype=dtype) for i, o in ((E, 2 * F), (F, E))]
        self.packed = self.method.pack_experts({"gate_up": self.gate_up, "down": self.down}, spec)
        self.x = self.draw(self.num_tokens, E)
        order = torch.rand((self.num_tokens, spec.num_experts), generator=self.generator).argsort(1)
        self.logits = (order * 0.125).to(self.dtype)  # no two alike: which of them is taken would be nobody's fault
        self.correction = self.draw(spec.num_experts).float() * 0.1 if spec.scoring == "sigmoid" else None

    def draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def found(self, rows: Any = slice(None), x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        return self.method.apply_experts(x[rows], self.logits[rows], self.correction, self.packed)

    def expected(self) -> torch.Tensor:
        """In float32, but for the products."""
        layers = [
            (self.method.pack({"weight": enter}), self.method.pack({"weight": leave}))
            for enter, leave in zip(self.gate_up, self.down, strict=True)
        ]

        def run_expert(expert: int, rows: torch.Tensor) -> torch.Tensor:
            enter, leave = layers[expert]
            gated = reference.silu_and_mul(self.method.apply(rows.to(self.dtype), enter, None).float())
            return self.method.apply(gated.to(self.dtype), leave, None).float()

        return reference.moe_by_expert(self.x.float(), self.logits, self.correction, self.spec, run_expert)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", SPECS)
def test_experts_in_one_call_are_the_experts_one_by_one(
    kernels: native.Kernels, name: str, scheme: str, dtype: str, count: Callable[..., int]
) -> None:
    for size in SIZES[: count(2, full=len(SIZES))]:
        case = Case(kernels, scheme, dtype, SPECS[name], size)
        assert isinstance(case.method, ExpertsMethod)
        before = case.x.clone(), case.logits.clone()
        found, expected = case.found(), case.expected()
        assert (found.shape, found.dtype) == (case.x.shape, case.dtype)
        assert torch.equal(case.x, before[0])
        assert torch.equal(case.logits, before[1])
        error = float((found.float() - expected).norm() / expected.norm())
        assert error <= TOLERANCE[scheme][dtype], (size, error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_token_has_the_same_bits_alone_and_in_any_batch(kernels: native.Kernels, scheme: str, dtype: str) -> None:
    case = Case(kernels, scheme, dtype, SPECS["two, normalised"], (150, 130, 40))
    together = case.found()
    for size in (1, 2, 7, 33):
        for start in (0, 5, 150 - size):
            assert torch.equal(case.found(slice(start, start + size)), together[start : start + size]), (size, start)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_tokens_to_one_expert_and_none_to_others(kernels: native.Kernels, scheme: str) -> None:
    case = Case(kernels, scheme, "bfloat16", MoeSpec(num_experts=6, top_k=1), (600, 64, 32))
    case.logits[:] = 0
    case.logits[:, 4] = 9
    expected = case.expected()
    assert float((case.found().float() - expected).norm() / expected.norm()) <= TOLERANCE[scheme]["bfloat16"]
    assert case.found(slice(0, 0)).shape == (0, 64)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_strided_tokens_and_logits_of_another_type(kernels: native.Kernels, scheme: str) -> None:
    case = Case(kernels, scheme, "bfloat16", SPECS["eight"], (9, 96, 40))
    wide = torch.cat([case.x, case.x], dim=1)[:, :96]
    expected = case.found()
    assert torch.equal(case.found(x=wide), expected)
    case.logits = torch.cat([case.logits, case.logits], dim=1).float()[:, :33]
    assert torch.equal(case.found(), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_that_are_none_stay_in_their_token(kernels: native.Kernels, scheme: str) -> None:
    case = Case(kernels, scheme, "float32", SPECS["groups by two"], (20, 64, 32))
    sound = case.found()
    case.x[3, 5] = float("nan")
    case.x[7, 0] = float("inf")
    case.logits[11] = float("nan")
    found, broken = case.found(), torch.zeros(20, dtype=torch.bool)
    broken[[3, 7, 11]] = True
    assert torch.equal(found[~broken], sound[~broken])
    assert not bool(found[broken].isfinite().any())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_take_what_was_foreseen_and_may_move(kernels: native.Kernels, scheme: str) -> None:
    case = Case(kernels, scheme, "bfloat16", SPECS["two, normalised"], (3, 96, 40))
    foreseen = case.spec.num_experts * sum(case.method.packed_bytes(shape) for shape in case.shapes)
    assert case.allocator.allocated_bytes("weights") == foreseen
    assert isinstance(case.packed, PackedExperts)
    expected = case.found()
    contents = case.packed.memory.clone()
    case.packed.memory.untyped_storage().resize_(0)
    blocker = torch.empty_like(contents)
    case.packed.memory.untyped_storage().resize_(contents.nbytes)
    case.packed.memory.copy_(contents)
    assert torch.equal(case.found(), expected)
    assert blocker.nbytes == contents.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_scratch_memory_is_enough(kernels: native.Kernels, dtype: str) -> None:
    packed = Case(kernels, UNQUANTIZED, dtype, SPECS["eight"], (1, 70, 33)).packed
    for num_tokens in (0, 1, 2, 3, 63, 64, 65, 1000):
        needed = kernels.call.fl_moe_scratch_bytes(packed.address, num_tokens)
        assert needed <= packed.scratch_bytes(num_tokens) <= needed + 64 * 8


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_with_experts_is_recorded(kernels: native.Kernels, scheme: str) -> None:
    case = Case(kernels, scheme, "bfloat16", SPECS["two, normalised"], (1, 64, 32))
    router = case.method.pack({"weight": case.draw(8, 64)})
    recorder = StepRecorder(kernels, lambda: 0)

    def forward(x: torch.Tensor, positions: torch.Tensor, step: object) -> torch.Tensor:
        for _ in range(3):
            logits = case.method.apply(x, router, None)
            x = case.method.apply_experts(x, logits, case.correction, case.packed)
        return x

    with torch.inference_mode():
        for _ in range(4):
            x = case.draw(5, 64)
            found = recorder.run(forward, x, torch.zeros(5, dtype=torch.int64), SimpleNamespace(groups=())).clone()
            assert torch.equal(found, forward(x, x, None))
    assert not recorder.foreign
    assert any(recorder._recordings.values())
