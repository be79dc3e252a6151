"""The CPU's attention backends against a float64 oracle that walks token by token through the block tables."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fairlead.interface import AttentionMetadata, AttentionShape
from fairlead.ops.attention import ReferenceAttention, SlotCache
from fairlead.ops.table import TOLERANCE
from fairlead_cpu import attention
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.attention import SdpaAttention

BACKENDS = ("sdpa", "reference")


def make_backend(name: str, shape: AttentionShape) -> SdpaAttention | ReferenceAttention:
    if name == "sdpa":
        return SdpaAttention(shape, HostAllocator())
    return ReferenceAttention(shape, HostAllocator(), torch.device("cpu"))


def make_shape(
    num_heads: int = 4, num_kv_heads: int = 2, head_size: int = 16, block_size: int = 16, dtype: str = "float32"
) -> AttentionShape:
    return AttentionShape(
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        block_size=block_size,
        scale=head_size**-0.5,
        dtype=dtype,
    )


@dataclass(kw_only=True)
class Case:
    """A step: for each sequence its new tokens, its context (new ones included) and its blocks."""

    shape: AttentionShape
    query_lens: list[int]
    seq_lens: list[int]
    tables: list[list[int]]
    num_blocks: int

    def metadata(self) -> AttentionMetadata:
        tables_SB = np.zeros((len(self.tables), max(map(len, self.tables))), np.int32)
        for row, table in zip(tables_SB, self.tables, strict=True):
            row[: len(table)] = table
        slots = [slot for i in range(len(self.tables)) for slot in self.slots(i)[-self.query_lens[i] :]]
        return AttentionMetadata(
            query_lens_S=np.array(self.query_lens, np.int32),
            seq_lens_S=np.array(self.seq_lens, np.int32),
            block_tables_SB=tables_SB,
            slot_mapping_T=np.array(slots, np.int32),
        )

    def slots(self, i: int) -> list[int]:
        size = self.shape.block_size
        return [self.tables[i][p // size] * size + p % size for p in range(self.seq_lens[i])]


def make_case(rng: np.random.Generator, shape: AttentionShape, lens: list[tuple[int, int]]) -> Case:
    """Sequences of (new tokens, context), in blocks scattered over a cache that is larger than needed."""
    num_needed = [-(-context // shape.block_size) for _, context in lens]
    num_blocks = sum(num_needed) + 3
    free = rng.permutation(num_blocks).tolist()
    tables = [[free.pop() for _ in range(n)] for n in num_needed]
    return Case(
        shape=shape,
        query_lens=[q for q, _ in lens],
        seq_lens=[n for _, n in lens],
        tables=tables,
        num_blocks=num_blocks,
    )


def make_inputs(
    rng: np.random.Generator, case: Case, fused: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (slices of one tensor if `fused`) and caches whose slots outside the context hold NaN."""
    s = case.shape
    dtype = getattr(torch, s.dtype)
    num_tokens, widths = sum(case.query_lens), (s.num_heads, s.num_kv_heads, s.num_kv_heads)
    packed = torch.from_numpy(rng.normal(0, 1, (num_tokens, sum(widths), s.head_size))).to(dtype)
    q, k, v = packed.split(widths, dim=1)
    if not fused:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    size = (case.num_blocks * s.block_size, s.num_kv_heads, s.head_size)
    caches = [torch.full(size, torch.nan, dtype=dtype) for _ in range(2)]
    old = sorted({slot for i in range(len(case.tables)) for slot in case.slots(i)[: -case.query_lens[i]]})
    for cache in caches:
        cache[old] = torch.from_numpy(rng.normal(0, 1, (len(old), *size[1:]))).to(dtype)
    return q, k, v, caches[0], caches[1]


def oracle(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> np.ndarray:
    """Attention of every query over the slots of its own and earlier positions, in float64."""
    q64, k64, v64, k_cache64, v_cache64 = (x.double().numpy().copy() for x in (q, k, v, k_cache, v_cache))
    mapping = case.metadata().slot_mapping_T
    k_cache64[mapping], v_cache64[mapping] = k64, v64
    group = case.shape.num_heads // case.shape.num_kv_heads
    out, row = np.empty_like(q64), 0
    for i, num_queries in enumerate(case.query_lens):
        slots = case.slots(i)
        for position in range(case.seq_lens[i] - num_queries, case.seq_lens[i]):
            seen = slots[: position + 1]
            keys = np.repeat(k_cache64[seen], group, axis=1)
            values = np.repeat(v_cache64[seen], group, axis=1)
            scores = np.einsum("hd,lhd->hl", q64[row], keys) * case.shape.scale
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[row] = np.einsum("hl,lhd->hd", weights / weights.sum(axis=1, keepdims=True), values)
            row += 1
    return out


def run(
    name: str,
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
) -> tuple[torch.Tensor, SlotCache]:
    """A step on copies of the caches; returns the output and the caches after it."""
    backend = make_backend(name, case.shape)
    cache = SlotCache(k=k_cache.clone(), v=v_cache.clone())
    return backend.forward(q, k, v, cache, backend.plan(case.metadata())), cache


def check(name: str, rng: np.random.Generator, case: Case, *, fused: bool = False) -> torch.Tensor:
    """Output against the oracle; inputs and other slots unchanged."""
    q, k, v, k_cache, v_cache = inputs = make_inputs(rng, case, fused)
    before = [x.clone() for x in inputs[:3]]
    out, cache = run(name, case, *inputs)
    assert out.shape == q.shape
    assert out.dtype == q.dtype
    expected = oracle(case, *inputs)
    tolerance = TOLERANCE[case.shape.dtype]
    np.testing.assert_allclose(out.double().numpy(), expected, atol=tolerance, rtol=tolerance)
    assert all(torch.equal(x, y) for x, y in zip(before, (q, k, v), strict=True)), "an input was changed"
    mapping = torch.from_numpy(case.metadata().slot_mapping_T).long()
    for written, new, old in ((cache.k, k, k_cache), (cache.v, v, v_cache)):
        expected_cache = old.clone()
        expected_cache[mapping] = new
        assert torch.equal(written.nan_to_num(7e9), expected_cache.nan_to_num(7e9))
    return out


EDGES = [(1, 1), (1, 15), (1, 16), (1, 17), (15, 15), (16, 16), (17, 17), (2, 17), (16, 33), (1, 33), (5, 21), (2, 2)]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("lens", EDGES, ids=str)
def test_one_sequence_at_block_edges(name: str, lens: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    check(name, rng, make_case(rng, make_shape(), [lens]))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 128, 256])
def test_head_sizes(name: str, head_size: int, dtype: str) -> None:
    rng = np.random.default_rng(head_size)
    check(name, rng, make_case(rng, make_shape(head_size=head_size, dtype=dtype), EDGES), fused=True)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2), (6, 2), (8, 1), (7, 1), (16, 1)], ids=str)
def test_head_ratios(name: str, heads: tuple[int, int]) -> None:
    rng = np.random.default_rng(heads[0])
    check(name, rng, make_case(rng, make_shape(num_heads=heads[0], num_kv_heads=heads[1]), EDGES))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
def test_random_mixes(name: str, block_size: int, count: Callable[..., int]) -> None:
    rng = np.random.default_rng(block_size)
    for i in range(count(6, full=300)):
        lens = []
        for _ in range(int(rng.integers(1, 14))):
            context = int(rng.integers(1, 100))
            lens.append((int(rng.choice([1, 1, context, rng.integers(1, context + 1)])), context))
        ratio, num_kv_heads = int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 2, 3]))
        shape = make_shape(
            num_heads=ratio * num_kv_heads,
            num_kv_heads=num_kv_heads,
            head_size=int(rng.choice([8, 16, 20])),
            block_size=block_size,
            dtype=("float32", "bfloat16")[i % 2],
        )
        check(name, rng, make_case(rng, shape, lens), fused=bool(i % 3))


@pytest.mark.parametrize("num_tokens", [64, 600, 4000])
def test_a_step_is_cut_to_bounded_masks(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long chunks and large groups are attended to in pieces, down to a row at a time."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(attention, "_MAX_SCORES", num_tokens)
    lens = [(40, 90), (1, 70), (33, 33), (1, 64), (7, 100), (1, 65), (1, 1), (12, 13)]
    case = make_case(rng, make_shape(), lens)
    check("sdpa", rng, case)
    plan = SdpaAttention(case.shape, HostAllocator()).plan(case.metadata())
    assert isinstance(plan, attention._Plan)
    masks = [g.mask for g in plan.groups if g.mask is not None]
    assert masks
    assert max(m.numel() for m in masks) <= max(num_tokens, 100)


@pytest.mark.parametrize("name", BACKENDS)
def test_many_short_prompts_and_decodes_at_once(name: str) -> None:
    rng = np.random.default_rng(2)
    lens = (
        [(n, n) for n in range(1, 20)] + [(1, int(n)) for n in rng.integers(1, 290, 40)] + [(3, n) for n in (3, 9, 50)]
    )
    check(name, rng, make_case(rng, make_shape(), [lens[i] for i in rng.permutation(len(lens))]))


@pytest.mark.parametrize("name", BACKENDS)
def test_sequences_share_blocks(name: str) -> None:
    """Sequences 0 and 1 decode over the same first two blocks; 2 and 3 read what 0 wrote in earlier steps."""
    rng = np.random.default_rng(3)
    case = Case(
        shape=make_shape(block_size=8),
        query_lens=[1, 1, 5, 17],
        seq_lens=[20, 17, 21, 33],
        tables=[[4, 2, 7], [4, 2, 5], [4, 2, 1], [4, 2, 6, 3, 0]],
        num_blocks=9,
    )
    check(name, rng, case)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sequence_reads_a_block_that_another_fills_in_the_same_step(name: str) -> None:
    rng = np.random.default_rng(4)
    case = Case(
        shape=make_shape(block_size=8),
        query_lens=[3, 16, 1],
        seq_lens=[19, 16, 9],
        tables=[[4, 2, 7], [4, 2], [4, 5]],
        num_blocks=9,
    )
    check(name, rng, case)


@pytest.mark.parametrize("name", BACKENDS)
def test_steps_over_one_cache_equal_one_whole_prompt(name: str) -> None:
    rng = np.random.default_rng(5)
    whole = make_case(rng, make_shape(block_size=8), [(50, 50)])
    inputs = make_inputs(rng, whole, fused=False)
    expected, _ = run(name, whole, *inputs)
    backend, cache = make_backend(name, whole.shape), SlotCache(k=inputs[3].clone(), v=inputs[4].clone())
    done = 0
    for size in (1, 7, 8, 9, 1, 1, 16, 7):
        rows = slice(done, done + size)
        done += size
        case = Case(
            shape=whole.shape, query_lens=[size], seq_lens=[done], tables=[whole.tables[0]], num_blocks=whole.num_blocks
        )
        out = backend.forward(*(x[rows] for x in inputs[:3]), cache, backend.plan(case.metadata()))
        torch.testing.assert_close(out, expected[rows], atol=1e-5, rtol=1e-5)
    assert done == 50


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sequence_with_nan_fails_alone(name: str) -> None:
    rng = np.random.default_rng(6)
    lens = [(1, 30), (1, 31), (4, 20), (4, 21), (9, 9), (1, 30)]
    case = make_case(rng, make_shape(), lens)
    q, k, v, k_cache, v_cache = make_inputs(rng, case, fused=False)
    healthy, _ = run(name, case, q, k, v, k_cache, v_cache)
    rows = {1: [1], 3: [6, 7, 8, 9]}
    bad = [row for part in rows.values() for row in part]
    v[bad] = torch.nan
    out, _ = run(name, case, q, k, v, k_cache, v_cache)
    others = [row for row in range(len(q)) if row not in bad]
    assert out[bad].isnan().all()
    assert torch.equal(out[others], healthy[others])


@pytest.mark.parametrize("name", BACKENDS)
def test_blocks_are_copied_in_the_order_given(name: str) -> None:
    backend = make_backend(name, make_shape(block_size=4))
    caches = [cache for cache in backend.allocate(6) if isinstance(cache, SlotCache)]
    assert len(caches) == 1
    for tensor in (caches[0].k, caches[0].v):
        assert tensor.shape == (24, 2, 16)
        tensor.copy_(torch.arange(6.0).repeat_interleave(4)[:, None, None].expand(24, 2, 16))
    backend.copy_blocks(caches, [(1, 2), (2, 3), (5, 1), (0, 0)])
    for tensor in (caches[0].k, caches[0].v):
        assert tensor[:, 0, 0].tolist() == [x for b in (0, 5, 1, 1, 4, 5) for x in [b] * 4]


@pytest.mark.parametrize("name", BACKENDS)
def test_block_bytes_are_what_the_allocator_hands_out(name: str) -> None:
    allocator = HostAllocator()
    shape = AttentionShape(
        num_layers=3, num_heads=6, num_kv_heads=2, head_size=20, block_size=8, scale=1.0, dtype="bfloat16"
    )
    backend = (
        SdpaAttention(shape, allocator) if name == "sdpa" else ReferenceAttention(shape, allocator, torch.device("cpu"))
    )
    assert allocator.allocated_bytes("kv_cache") == 0
    caches = backend.allocate(11)
    assert len(caches) == 3
    assert allocator.allocated_bytes("kv_cache") == 11 * backend.block_bytes() == 11 * 3 * 2 * 8 * 2 * 20 * 2


def test_the_scale_is_the_shapes() -> None:
    rng = np.random.default_rng(8)
    shape = AttentionShape(
        num_layers=1, num_heads=2, num_kv_heads=1, head_size=16, block_size=4, scale=1.0, dtype="float32"
    )
    check("sdpa", rng, make_case(rng, shape, [(1, 9), (5, 9), (6, 6)]))
