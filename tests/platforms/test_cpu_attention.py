"""The CPU's attention backends against a float64 oracle that walks token by token through the block tables."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from fairlead.interface import AttentionMetadata, AttentionShape, AttentionSpec
from fairlead.ops.attention import ReferenceAttention, SlotCache
from fairlead.ops.table import TOLERANCE
from fairlead_cpu import attention, native, topology
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.attention import SdpaAttention
from fairlead_cpu.native_attention import BlockCache, NativeAttention

NATIVE = tuple(f"native {isa}" for isa in native.usable())
SLOTTED = ("sdpa", "reference")
BACKENDS = (*NATIVE, *SLOTTED)


@functools.cache
def kernels(isa: str) -> native.Kernels:
    """The library of one instruction set, with two threads whatever the machine has."""
    return native.Kernels(isa, topology.Layout(cpus=(-1, -1), bound=False, reason="test"))


@pytest.fixture(scope="module", autouse=True)
def threads_end() -> Iterator[None]:
    yield
    for name in NATIVE:
        kernels(name.split()[1]).call.fl_pool_shutdown()


Backend = NativeAttention | SdpaAttention | ReferenceAttention


def make_backend(name: str, shape: AttentionShape) -> Backend:
    if name in NATIVE:
        return NativeAttention(shape, HostAllocator(), kernels(name.split()[1]))
    if name == "sdpa":
        return SdpaAttention(shape, HostAllocator())
    return ReferenceAttention(shape, HostAllocator(), torch.device("cpu"))


def make_shape(
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_size: int = 16,
    block_size: int = 16,
    dtype: str = "float32",
    num_layers: int = 1,
    scale: float | None = None,
    alibi: bool = False,
    **kind: Any,
) -> AttentionShape:
    """`kind` goes into the spec; the slopes of `alibi` fall from head to head, as usual."""
    spec = AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        scale=head_size**-0.5 if scale is None else scale,
        alibi_slopes=tuple(2.0 ** (-8 * (i + 1) / num_heads) for i in range(num_heads)) if alibi else None,
        **kind,
    )
    return AttentionShape(spec=spec, num_layers=num_layers, block_size=block_size, dtype=dtype)


LATENT: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 1, "head_size": 20, "value_size": 12}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "window of 1": {"sliding_window": 1},
    "window in a block": {"sliding_window": 5},
    "window of a block": {"sliding_window": 16},
    "window over blocks": {"sliding_window": 23},
    "window of a prompt": {"sliding_window": 40},
    "window never left": {"sliding_window": 1000},
    "cap": {"soft_cap": 1.5},
    "alibi": {"alibi": True},
    "latent": LATENT,
    "window, cap": {"sliding_window": 23, "soft_cap": 1.5},  # Gemma 2
    "window, alibi": {"sliding_window": 7, "alibi": True},
    "cap, alibi": {"soft_cap": 1.5, "alibi": True},
    "window, latent": {"sliding_window": 9, **LATENT},
    "all": {"sliding_window": 23, "soft_cap": 1.5, "alibi": True, **LATENT},
}


@dataclass(kw_only=True)
class Case:
    """A step: for each sequence its new tokens, its context (new ones included) and its blocks."""

    shape: AttentionShape
    query_lens: list[int]
    seq_lens: list[int]
    tables: list[list[int]]
    num_blocks: int

    def metadata(self) -> AttentionMetadata:
        """Blocks that have left the window are 0 in the tables."""
        tables_SB = np.zeros((len(self.tables), max(map(len, self.tables))), np.int32)
        for i, table in enumerate(self.tables):
            first = self.first_seen(self.seq_lens[i] - self.query_lens[i]) // self.shape.block_size
            tables_SB[i, first : len(table)] = table[first:]
        slots = [slot for i in range(len(self.tables)) for slot in self.slots(i)[-self.query_lens[i] :]]
        return AttentionMetadata(
            query_lens_S=np.array(self.query_lens, np.int32),
            seq_lens_S=np.array(self.seq_lens, np.int32),
            block_tables_SB=tables_SB,
            slot_mapping_T=np.array(slots, np.int32),
        )

    def first_seen(self, position: int) -> int:
        window = self.shape.spec.sliding_window
        return 0 if window is None else max(0, position - (window - 1))

    def slots(self, i: int) -> list[int]:
        size = self.shape.block_size
        return [self.tables[i][p // size] * size + p % size for p in range(self.seq_lens[i])]


def make_case(rng: np.random.Generator, shape: AttentionShape, lens: list[tuple[int, int]]) -> Case:
    """Sequences of (new tokens, context), in blocks scattered over a cache that is larger than needed; 0 is unused."""
    num_needed = [-(-context // shape.block_size) for _, context in lens]
    num_blocks = sum(num_needed) + 3
    free = (1 + rng.permutation(num_blocks - 1)).tolist()
    tables = [[free.pop() for _ in range(n)] for n in num_needed]
    return Case(
        shape=shape,
        query_lens=[q for q, _ in lens],
        seq_lens=[n for _, n in lens],
        tables=tables,
        num_blocks=num_blocks,
    )


@dataclass(kw_only=True)
class Inputs:
    """Without `v`, the values are the first entries of the keys, and `v_cache` is `k_cache`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor | None
    k_cache: torch.Tensor
    v_cache: torch.Tensor


def make_inputs(rng: np.random.Generator, case: Case, fused: bool = False) -> Inputs:
    """q, k, v (slices of one tensor if `fused`), and caches that hold NaN where no query of the step may look."""
    spec, dtype = case.shape.spec, getattr(torch, case.shape.dtype)
    num_tokens, widths = sum(case.query_lens), (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    packed = torch.from_numpy(rng.normal(0, 1, (num_tokens, sum(widths), spec.head_size))).to(dtype)
    q, k, v = packed.split(widths, dim=1)
    if not fused:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    size = (case.num_blocks * case.shape.block_size, spec.num_kv_heads, spec.head_size)
    caches = [torch.full(size, torch.nan, dtype=dtype) for _ in range(2)]
    seen: set[int] = set()
    for i, (num_queries, num_tokens) in enumerate(zip(case.query_lens, case.seq_lens, strict=True)):
        seen.update(case.slots(i)[case.first_seen(num_tokens - num_queries) : num_tokens - num_queries])
    old = sorted(seen)
    for cache in caches:
        cache[old] = torch.from_numpy(rng.normal(0, 1, (len(old), *size[1:]))).to(dtype)
    if spec.value_size is not None:
        return Inputs(q=q, k=k, v=None, k_cache=caches[0], v_cache=caches[0])
    return Inputs(q=q, k=k, v=v, k_cache=caches[0], v_cache=caches[1])


def oracle(case: Case, inputs: Inputs) -> np.ndarray:
    """Attention of every query over the slots of its own and the earlier positions in its window, in float64."""
    spec, mapping = case.shape.spec, case.metadata().slot_mapping_T
    q64, k64, k_cache64, v_cache64 = (
        x.double().numpy().copy() for x in (inputs.q, inputs.k, inputs.k_cache, inputs.v_cache)
    )
    k_cache64[mapping] = k64
    v_cache64[mapping] = k64 if inputs.v is None else inputs.v.double().numpy()
    group = spec.num_heads // spec.num_kv_heads
    value_size = spec.head_size if spec.value_size is None else spec.value_size
    out, row = np.empty((*q64.shape[:2], value_size)), 0
    for i, num_queries in enumerate(case.query_lens):
        slots = case.slots(i)
        for position in range(case.seq_lens[i] - num_queries, case.seq_lens[i]):
            seen = slots[case.first_seen(position) : position + 1]
            keys = np.repeat(k_cache64[seen], group, axis=1)
            values = np.repeat(v_cache64[seen], group, axis=1)[:, :, :value_size]
            scores = np.einsum("hd,lhd->hl", q64[row], keys) * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
            for head, slope in enumerate(spec.alibi_slopes or ()):
                scores[head] -= slope * np.arange(len(seen))[::-1]
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[row] = np.einsum("hl,lhd->hd", weights / weights.sum(axis=1, keepdims=True), values)
            row += 1
    return out


def make_cache(backend: Backend, num_blocks: int, inputs: Inputs) -> SlotCache | BlockCache:
    """A cache with the contents of `inputs`; in the native layout, NaN wherever nothing was written."""
    if not isinstance(backend, NativeAttention):
        k_cache = inputs.k_cache.clone()
        return SlotCache(k=k_cache, v=k_cache if inputs.v is None else inputs.v_cache.clone())
    cache = backend.allocate(num_blocks)[0]
    assert isinstance(cache, BlockCache)
    cache.blocks.view(inputs.q.dtype).fill_(torch.nan)
    slots = torch.nonzero(~inputs.k_cache.flatten(1).isnan().any(1))[:, 0]
    none = np.zeros(0, np.int32)
    write_only = AttentionMetadata(
        query_lens_S=none,
        seq_lens_S=none,
        block_tables_SB=none.reshape(0, 1),
        slot_mapping_T=slots.numpy().astype(np.int32),
    )
    q = inputs.q.new_zeros((len(slots), *inputs.q.shape[1:]))
    v = None if inputs.v is None else inputs.v_cache[slots]
    backend.forward(q, inputs.k_cache[slots], v, cache, backend.plan(write_only))
    return cache


def run(name: str, case: Case, inputs: Inputs) -> tuple[torch.Tensor, SlotCache | BlockCache]:
    """A step on copies of the caches; returns the output and the caches after it."""
    backend = make_backend(name, case.shape)
    cache = make_cache(backend, case.num_blocks, inputs)
    return backend.forward(inputs.q, inputs.k, inputs.v, cache, backend.plan(case.metadata())), cache


def check(rng: np.random.Generator, case: Case, *, fused: bool = False, names: tuple[str, ...] = BACKENDS) -> None:
    """Every backend against the oracle; inputs and other slots unchanged."""
    inputs = make_inputs(rng, case, fused)
    expected = oracle(case, inputs)
    for name in names:
        check_backend(name, case, inputs, expected)


def check_backend(name: str, case: Case, inputs: Inputs, expected: np.ndarray) -> None:
    given = [x for x in (inputs.q, inputs.k, inputs.v) if x is not None]
    before = [x.clone() for x in given]
    out, cache = run(name, case, inputs)
    assert out.shape == expected.shape
    assert out.dtype == inputs.q.dtype
    tolerance = TOLERANCE[case.shape.dtype]
    np.testing.assert_allclose(out.double().numpy(), expected, atol=tolerance, rtol=tolerance, err_msg=name)
    assert all(torch.equal(x, y) for x, y in zip(before, given, strict=True)), "an input was changed"
    if isinstance(cache, BlockCache):
        return  # what it holds shows in what is read: test_steps_over_one_cache_equal_one_whole_prompt
    mapping = torch.from_numpy(case.metadata().slot_mapping_T).long()
    for written, new, old in ((cache.k, inputs.k, inputs.k_cache), (cache.v, inputs.v, inputs.v_cache)):
        expected_cache = old.clone()
        expected_cache[mapping] = inputs.k if new is None else new
        assert torch.equal(written.nan_to_num(7e9), expected_cache.nan_to_num(7e9))


EDGES = [(1, 1), (1, 15), (1, 16), (1, 17), (15, 15), (16, 16), (17, 17), (2, 17), (16, 33), (1, 33), (5, 21), (2, 2)]


@pytest.mark.parametrize("lens", EDGES, ids=str)
def test_one_sequence_at_block_edges(lens: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    check(rng, make_case(rng, make_shape(), [lens]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 128, 256])
def test_head_sizes(head_size: int, dtype: str) -> None:
    rng = np.random.default_rng(head_size)
    check(rng, make_case(rng, make_shape(head_size=head_size, dtype=dtype), EDGES), fused=True)


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2), (6, 2), (8, 1), (7, 1), (16, 1)], ids=str)
def test_head_ratios(heads: tuple[int, int]) -> None:
    rng = np.random.default_rng(heads[0])
    check(rng, make_case(rng, make_shape(num_heads=heads[0], num_kv_heads=heads[1]), EDGES))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_attention(kind: str, dtype: str) -> None:
    rng = np.random.default_rng(len(kind))
    lens = [*EDGES, (1, 90), (1, 64), (7, 64), (23, 24), (40, 40), (41, 41), (50, 90), (24, 100), (1, 91)]
    check(rng, make_case(rng, make_shape(dtype=dtype, **KINDS[kind]), lens), fused=True)
    check(rng, make_case(rng, make_shape(dtype=dtype, **KINDS[kind]), [(64, 64)]))
    check(rng, make_case(rng, make_shape(dtype=dtype, **KINDS[kind]), [(1, 64)]))


@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
def test_random_mixes(block_size: int, count: Callable[..., int]) -> None:
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
            sliding_window=None if rng.random() < 0.5 else int(rng.integers(1, 110)),
            soft_cap=None if rng.random() < 0.7 else float(rng.uniform(0.5, 5)),
            alibi=bool(rng.random() < 0.3),
            value_size=int(rng.integers(1, 9)) if num_kv_heads == 1 and rng.random() < 0.5 else None,
        )
        check(rng, make_case(rng, shape, lens), fused=bool(i % 3))


@pytest.mark.parametrize("kind", ["full", "window over blocks", "cap", "latent", "window, cap"])
@pytest.mark.parametrize("num_tokens", [64, 600, 4000])
def test_a_step_is_cut_to_bounded_masks(num_tokens: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long chunks and large groups are attended to in pieces, down to a row at a time."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(attention, "_MAX_SCORES", num_tokens)
    lens = [(40, 90), (1, 70), (33, 33), (1, 64), (7, 100), (1, 65), (1, 1), (12, 13)]
    case = make_case(rng, make_shape(**KINDS[kind]), lens)
    check(rng, case, names=("sdpa",))
    plan = SdpaAttention(case.shape, HostAllocator()).plan(case.metadata())
    assert isinstance(plan, attention._Plan)
    masks = [g.mask for g in plan.groups if g.mask is not None]
    assert masks
    assert max(m.numel() for m in masks) <= max(num_tokens, 100)


def test_many_short_prompts_and_decodes_at_once() -> None:
    rng = np.random.default_rng(2)
    lens = (
        [(n, n) for n in range(1, 20)] + [(1, int(n)) for n in rng.integers(1, 290, 40)] + [(3, n) for n in (3, 9, 50)]
    )
    check(rng, make_case(rng, make_shape(), [lens[i] for i in rng.permutation(len(lens))]))


def test_sequences_share_blocks() -> None:
    """Sequences 0 and 1 decode over the same first two blocks; 2 and 3 read what 0 wrote in earlier steps."""
    rng = np.random.default_rng(3)
    case = Case(
        shape=make_shape(block_size=8),
        query_lens=[1, 1, 5, 17],
        seq_lens=[20, 17, 21, 33],
        tables=[[4, 2, 7], [4, 2, 5], [4, 2, 1], [4, 2, 6, 3, 0]],
        num_blocks=9,
    )
    check(rng, case)


def test_a_sequence_reads_a_block_that_another_fills_in_the_same_step() -> None:
    rng = np.random.default_rng(4)
    case = Case(
        shape=make_shape(block_size=8),
        query_lens=[3, 16, 1],
        seq_lens=[19, 16, 9],
        tables=[[4, 2, 7], [4, 2], [4, 5]],
        num_blocks=9,
    )
    check(rng, case)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_over_one_cache_equal_one_whole_prompt(name: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    whole = make_case(rng, make_shape(**{"block_size": 8, **KINDS[kind]}), [(50, 50)])
    inputs = make_inputs(rng, whole)
    expected, _ = run(name, whole, inputs)
    backend = make_backend(name, whole.shape)
    cache = make_cache(backend, whole.num_blocks, inputs)
    done = 0
    for size in (1, 7, 8, 9, 1, 1, 16, 7):
        rows = slice(done, done + size)
        done += size
        case = Case(
            shape=whole.shape, query_lens=[size], seq_lens=[done], tables=[whole.tables[0]], num_blocks=whole.num_blocks
        )
        v = None if inputs.v is None else inputs.v[rows]
        out = backend.forward(inputs.q[rows], inputs.k[rows], v, cache, backend.plan(case.metadata()))
        torch.testing.assert_close(out, expected[rows], atol=1e-5, rtol=1e-5)
    assert done == 50


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_with_nan_fails_alone(name: str, kind: str) -> None:
    rng = np.random.default_rng(6)
    lens = [(1, 30), (1, 31), (4, 20), (4, 21), (9, 9), (1, 30)]
    case = make_case(rng, make_shape(**KINDS[kind]), lens)
    inputs = make_inputs(rng, case)
    healthy, _ = run(name, case, inputs)
    rows = {1: [1], 3: [6, 7, 8, 9]}
    bad = [row for part in rows.values() for row in part]
    (inputs.k if inputs.v is None else inputs.v)[bad] = torch.nan
    out, _ = run(name, case, inputs)
    others = [row for row in range(len(out)) if row not in bad]
    assert out[bad].isnan().all()
    assert torch.equal(out[others], healthy[others])


@pytest.mark.parametrize("name", SLOTTED)
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


@pytest.mark.parametrize("name", SLOTTED)
@pytest.mark.parametrize("kind", ["keys and values", "latent"])
def test_blocks_go_to_the_host_and_come_back_in_the_order_given(name: str, kind: str) -> None:
    """Three device blocks, two host blocks; each holds its number, and each layer its own."""
    backend = make_backend(name, make_shape(num_layers=2, block_size=4, **(LATENT if kind == "latent" else {})))
    caches = [cache for cache in backend.allocate(3) if isinstance(cache, SlotCache)]
    hosts = [cache for cache in backend.allocate_host(2) if isinstance(cache, SlotCache)]
    assert len(caches) == len(hosts) == 2
    assert all((cache.v is cache.k) == (kind == "latent") for cache in (*caches, *hosts))
    assert [host.k.shape for host in hosts] == [(8, *cache.k.shape[1:]) for cache in caches]

    def blocks(cache: SlotCache) -> list[list[float]]:
        for tensor in (cache.k, cache.v):
            assert torch.equal(tensor, tensor[:, :1, :1].expand_as(tensor))
        return [tensor[::4, 0, 0].tolist() for tensor in (cache.k, cache.v)]

    for layer, cache in enumerate(caches):
        for number, tensor in enumerate((cache.k, cache.v)[: 1 if cache.v is cache.k else 2]):
            values = torch.arange(3.0) + 10 * layer + 100 * number
            tensor.copy_(values.repeat_interleave(4)[:, None, None].expand_as(tensor))
    backend.copy_to_host(caches, hosts, [(0, 1), (1, 0), (2, 1)])

    def holding(*numbers: float) -> list[list[list[float]]]:
        bases = [(10 * layer, 10 * layer + 100 * (kind != "latent")) for layer in (0, 1)]
        return [[[base + number for number in numbers] for base in pair] for pair in bases]

    assert [blocks(host) for host in hosts] == holding(1, 2)
    backend.copy_from_host(hosts, caches, [(0, 0), (1, 1), (0, 1)])
    assert [blocks(cache) for cache in caches] == holding(1, 1, 2)


@pytest.mark.parametrize("name", SLOTTED)
def test_block_bytes_are_what_the_allocator_hands_out(name: str) -> None:
    allocator = HostAllocator()
    shape = make_shape(num_layers=3, num_heads=6, num_kv_heads=2, head_size=20, block_size=8, dtype="bfloat16")
    backend = (
        SdpaAttention(shape, allocator) if name == "sdpa" else ReferenceAttention(shape, allocator, torch.device("cpu"))
    )
    assert allocator.allocated_bytes("kv_cache") == 0
    caches = backend.allocate(11)
    assert len(caches) == 3
    assert allocator.allocated_bytes("kv_cache") == 11 * backend.block_bytes() == 11 * 3 * 2 * 8 * 2 * 20 * 2


@pytest.mark.parametrize("name", SLOTTED)
def test_latent_values_are_stored_once(name: str) -> None:
    backend = make_backend(name, make_shape(num_layers=2, block_size=8, dtype="bfloat16", **LATENT))
    assert backend.block_bytes() == 2 * 8 * 20 * 2
    caches = [cache for cache in backend.allocate(3) if isinstance(cache, SlotCache)]
    assert len(caches) == 2
    assert all(cache.v is cache.k for cache in caches)
    for cache in caches:
        cache.k.copy_(torch.arange(3.0).repeat_interleave(8)[:, None, None].expand(24, 1, 20))
    backend.copy_blocks(caches, [(1, 2), (0, 1)])
    assert [cache.k[:, 0, 0].tolist() for cache in caches] == [[0.0] * 16 + [1.0] * 8] * 2


def test_the_scale_is_the_shapes() -> None:
    rng = np.random.default_rng(8)
    shape = make_shape(num_heads=2, num_kv_heads=1, block_size=4, scale=1.0)
    check(rng, make_case(rng, shape, [(1, 9), (5, 9), (6, 6)]))
