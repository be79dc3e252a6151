"""What the native attention promises beyond its values: the same bits in any batch and any chunk, its own layout."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from fairlead import LLM, SamplingParams
from fairlead.errors import ConfigError
from fairlead.interface import AttentionMetadata, AttentionShape, AttentionSpec
from fairlead_cpu import native, topology
from fairlead_cpu.allocator import HostAllocator
from fairlead_cpu.native_attention import KV_DTYPES, BlockCache, NativeAttention

DTYPES = ("float32", "bfloat16")
pytestmark = pytest.mark.skipif(not native.usable(), reason="fairlead-cpu was built without kernels")

# Each with another path: heads per kv-head, sizes of heads, blocks of one, two and no whole segments of 16 tokens.
KINDS: dict[str, dict[str, Any]] = {
    "3 heads a kv-head": {"num_heads": 6, "num_kv_heads": 2, "head_size": 64},
    "7 heads a kv-head": {"num_heads": 7, "num_kv_heads": 1, "head_size": 32, "block_size": 32},
    "1 head a kv-head": {"num_heads": 2, "num_kv_heads": 2, "head_size": 128, "block_size": 64},
    "16 heads a kv-head": {"num_heads": 16, "num_kv_heads": 1, "head_size": 16},
    "odd sizes": {"num_heads": 4, "num_kv_heads": 2, "head_size": 21, "block_size": 8},
    "head size 80": {"num_heads": 3, "num_kv_heads": 1, "head_size": 80},
    "head size 256": {"num_heads": 2, "num_kv_heads": 1, "head_size": 256},
    "window": {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "sliding_window": 100},
    "cap, slopes": {"num_heads": 4, "num_kv_heads": 2, "head_size": 32, "soft_cap": 2.0, "slopes": True},
    "latent": {"num_heads": 20, "num_kv_heads": 1, "head_size": 40, "value_size": 24},
}


@functools.cache
def library(isa: str) -> native.Kernels:
    return native.Kernels(isa, topology.Layout(cpus=(-1, -1), bound=False, reason="test"))


@pytest.fixture(params=native.usable())
def kernels(request: pytest.FixtureRequest) -> native.Kernels:
    """The library of one instruction set, with two threads whatever the machine has."""
    return library(request.param)


@pytest.fixture(scope="module", autouse=True)
def threads_end() -> Iterator[None]:
    yield
    for isa in native.usable():
        library(isa).call.fl_pool_shutdown()


def make_backend(
    kernels: native.Kernels,
    dtype: str,
    *,
    block_size: int = 16,
    slopes: bool = False,
    kv_dtype: str = "auto",
    **spec: Any,
) -> NativeAttention:
    alibi = tuple(0.5**i for i in range(spec["num_heads"])) if slopes else None
    shape = AttentionShape(
        spec=AttentionSpec(scale=spec["head_size"] ** -0.5, alibi_slopes=alibi, **spec),
        num_layers=1,
        block_size=block_size,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    return NativeAttention(shape, HostAllocator(), kernels)


class Prompt:
    """A sequence with all its q, k, v, and the blocks that it lies in."""

    def __init__(self, backend: NativeAttention, num_tokens: int, table: list[int], seed: int) -> None:
        spec, generator = backend.shape.spec, torch.Generator().manual_seed(seed)

        def random(heads: int) -> torch.Tensor:
            values = torch.empty(num_tokens, heads, spec.head_size).normal_(generator=generator)
            return values.to(getattr(torch, backend.shape.dtype))

        self.q, self.k, self.v = random(spec.num_heads), random(spec.num_kv_heads), random(spec.num_kv_heads)
        self.block_size, self.table = backend.shape.block_size, table
        self.is_latent = spec.value_size is not None

    def slots(self, begin: int, end: int) -> list[int]:
        size = self.block_size
        return [self.table[p // size] * size + p % size for p in range(begin, end)]


def step(backend: NativeAttention, cache: BlockCache, parts: list[tuple[Prompt, int, int]]) -> list[torch.Tensor]:
    """One step over tokens [begin, end) of some sequences; the outputs of each."""
    tables = np.zeros((len(parts), max(len(prompt.table) for prompt, _, _ in parts)), np.int32)
    for row, (prompt, _, _) in zip(tables, parts, strict=True):
        row[: len(prompt.table)] = prompt.table
    metadata = AttentionMetadata(
        query_lens_S=np.array([end - begin for _, begin, end in parts], np.int32),
        seq_lens_S=np.array([end for _, _, end in parts], np.int32),
        block_tables_SB=tables,
        slot_mapping_T=np.array([s for prompt, begin, end in parts for s in prompt.slots(begin, end)], np.int32),
    )
    q, k, v = (
        torch.cat([getattr(prompt, name)[begin:end] for prompt, begin, end in parts]) for name in ("q", "k", "v")
    )
    out = backend.forward(q, k, None if parts[0][0].is_latent else v, cache, backend.plan(metadata))
    return list(out.split([end - begin for _, begin, end in parts]))


def new_cache(backend: NativeAttention, num_blocks: int) -> BlockCache:
    cache = backend.allocate(num_blocks)[0]
    assert isinstance(cache, BlockCache)
    if backend.shape.kv_dtype == "auto":
        cache.blocks.view(getattr(torch, backend.shape.dtype)).fill_(torch.nan)
    else:
        cache.blocks.fill_(0x7F)  # NaN in both formats
    return cache


def narrowed(x: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """As such a cache stores it: rounded to the nearest, and what is too large to the largest number."""
    dtype: torch.dtype = getattr(torch, kv_dtype)
    return x.float().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_of_8_bits_gives_the_bits_of_what_it_stores(
    kernels: native.Kernels, kind: str, dtype: str, kv_dtype: str
) -> None:
    narrow = make_backend(kernels, dtype, kv_dtype=kv_dtype, **KINDS[kind])
    wide = make_backend(kernels, dtype, **KINDS[kind])
    size = wide.shape.block_size
    assert narrow.block_bytes() * (4 if dtype == "float32" else 2) == wide.block_bytes()
    num_blocks = -(-150 // size)
    tables = (1 + np.random.default_rng(0).permutation(2 * num_blocks)).reshape(2, num_blocks).tolist()
    prompts = [Prompt(wide, 150, table, i) for i, table in enumerate(tables)]
    rounded = [Prompt(wide, 150, table, i) for i, table in enumerate(tables)]
    for prompt in rounded:
        prompt.k, prompt.v = (narrowed(x, kv_dtype).to(x.dtype) for x in (prompt.k, prompt.v))
    caches = [new_cache(backend, 2 * num_blocks + 1) for backend in (narrow, wide)]
    for begin, end in itertools.pairwise([0, 1, 16, 33, 64, 131, 149, 150]):
        found, wanted = (
            step(backend, cache, [(prompt, begin, end) for prompt in given])
            for backend, cache, given in ((narrow, caches[0], prompts), (wide, caches[1], rounded))
        )
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, wanted, strict=True)), (begin, end)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES[1:])
def test_every_number_of_16_bits_is_rounded_to_8_as_torch_does(kernels: native.Kernels, kv_dtype: str) -> None:
    spec = {"num_heads": 1, "num_kv_heads": 1, "head_size": 256, "block_size": 8}  # plain: rows of codes
    backend = make_backend(kernels, "bfloat16", kv_dtype=kv_dtype, **spec)
    prompt = Prompt(backend, 256, list(range(1, 33)), 0)
    prompt.k = torch.arange(2**16).to(torch.uint16).view(torch.bfloat16).view(256, 1, 256)
    cache = new_cache(backend, 33)
    step(backend, cache, [(prompt, 0, 256)])
    codes = cache.blocks[1:].view(256, 2, 256)[:, 0]
    wanted = narrowed(prompt.k[:, 0], kv_dtype)
    is_nan = prompt.k[:, 0].isnan()
    assert torch.equal(codes[~is_nan], wanted.view(torch.uint8)[~is_nan])
    assert codes.view(wanted.dtype)[is_nan].float().isnan().all()


def test_another_cache_is_refused(kernels: native.Kernels) -> None:
    with pytest.raises(ConfigError, match="no cache of float16; it has auto, float8_e4m3fn, float8_e5m2"):
        make_backend(kernels, "float32", kv_dtype="float16", num_heads=1, num_kv_heads=1, head_size=64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_the_batch_do_not_show_in_the_bits(kernels: native.Kernels, kind: str, dtype: str) -> None:
    """A prompt of 1200 tokens as a whole; then in chunks, decodes among them, beside other sequences."""
    backend = make_backend(kernels, dtype, **KINDS[kind])
    num_tokens, size = 1200, backend.shape.block_size
    num_blocks = -(-num_tokens // size)
    rng = np.random.default_rng(0)
    tables = (1 + rng.permutation(3 * num_blocks)).reshape(3, num_blocks).tolist()
    prompt, second, third = (Prompt(backend, num_tokens, table, i) for i, table in enumerate(tables))
    whole = step(backend, new_cache(backend, 3 * num_blocks + 1), [(prompt, 0, num_tokens)])[0]
    assert whole.isfinite().all()

    cache = new_cache(backend, 3 * num_blocks + 1)
    borders = [0, 1, 2, 17, 64, 65, 300, 301, 511, 512, 513, 600, 1024, 1027, 1100, 1199, 1200]
    done = other = 0
    for begin, end in itertools.pairwise(borders):
        parts = [(prompt, begin, end)]
        if begin % 2:  # as the second of three, both neighbours further than it or not
            beside = int(rng.integers(1, 90))
            parts = [(second, other, other + beside), (prompt, begin, end), (third, other, other + beside)]
            other += beside
        found = step(backend, cache, parts)[len(parts) // 2]
        assert torch.equal(found, whole[begin:end]), f"tokens {begin} to {end}"
        done = end
    assert done == num_tokens


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["3 heads a kv-head", "7 heads a kv-head", "odd sizes", "window", "latent"])
def test_a_shared_prefix_is_read_once_and_gives_the_same_bits(kernels: native.Kernels, kind: str, dtype: str) -> None:
    """Five sequences share 1040 tokens; one of them decodes alone and with the others."""
    backend = make_backend(kernels, dtype, **KINDS[kind])
    size = backend.shape.block_size
    num_shared, num_own = 1040 // size, -(-200 // size)
    shared = list(range(1, num_shared + 1))
    lengths = [num_shared * size + n for n in (1, 33, 199, 60, 7)]
    prompts = []
    for i, length in enumerate(lengths):
        first = num_shared + 1 + i * num_own
        prompt = Prompt(backend, length, shared + list(range(first, first + num_own)), i)
        if i:
            for name in ("k", "v"):
                getattr(prompt, name)[: num_shared * size] = getattr(prompts[0], name)[: num_shared * size]
        prompts.append(prompt)
    cache = new_cache(backend, num_shared + 5 * num_own + 1)
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        step(backend, cache, [(prompt, num_shared * size if i else 0, length)])
    alone = [step(backend, cache, [(prompt, n - 1, n)])[0] for prompt, n in zip(prompts, lengths, strict=True)]
    together = step(backend, cache, [(prompt, n - 1, n) for prompt, n in zip(prompts, lengths, strict=True)])
    for a, b in zip(alone, together, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_float16_is_refused(kernels: native.Kernels) -> None:
    with pytest.raises(ConfigError, match="the native attention has no float16; it has float32, bfloat16"):
        make_backend(kernels, "float16", num_heads=4, num_kv_heads=2, head_size=16)


def test_an_empty_step(kernels: native.Kernels) -> None:
    backend = make_backend(kernels, "float32", num_heads=4, num_kv_heads=2, head_size=16)
    cache = new_cache(backend, 2)
    none = np.zeros(0, np.int32)
    plan = backend.plan(
        AttentionMetadata(query_lens_S=none, seq_lens_S=none, block_tables_SB=none.reshape(0, 0), slot_mapping_T=none)
    )
    assert backend.forward(torch.empty(0, 4, 16), torch.empty(0, 2, 16), torch.empty(0, 2, 16), cache, plan).shape == (
        0,
        4,
        16,
    )


def test_copied_blocks_hold_the_same_tokens(kernels: native.Kernels) -> None:
    backend = make_backend(kernels, "bfloat16", num_heads=4, num_kv_heads=2, head_size=16)
    cache = new_cache(backend, 8)
    prompt = Prompt(backend, 40, [1, 2, 3], 0)
    step(backend, cache, [(prompt, 0, 39)])
    backend.copy_blocks([cache], [(3, 6), (2, 5), (1, 4), (6, 7)])
    expected = step(backend, cache, [(prompt, 39, 40)])[0]
    for table in ([4, 5, 6], [1, 5, 7]):
        prompt.table = table
        assert torch.equal(step(backend, cache, [(prompt, 39, 40)])[0], expected)


def test_blocks_go_to_the_host_and_come_back(kernels: native.Kernels) -> None:
    backend = make_backend(kernels, "bfloat16", num_heads=4, num_kv_heads=2, head_size=16)
    cache, (host,) = new_cache(backend, 5), backend.allocate_host(3)
    prompt = Prompt(backend, 40, [1, 2, 3], 0)
    step(backend, cache, [(prompt, 0, 39)])
    expected = step(backend, cache, [(prompt, 39, 40)])[0]
    backend.copy_to_host([cache], [host], [(3, 0), (1, 0), (2, 1), (3, 2)])
    cache.blocks.fill_(0xFF)
    backend.copy_from_host([host], [cache], [(0, 2), (1, 1), (2, 4)])
    prompt.table = [2, 1, 4]
    assert torch.equal(step(backend, cache, [(prompt, 39, 40)])[0], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_takes_what_the_allocator_hands_out(kernels: native.Kernels, kind: str, dtype: str) -> None:
    backend = make_backend(kernels, dtype, **KINDS[kind])
    spec, itemsize = backend.shape.spec, getattr(torch, dtype).itemsize
    allocator = backend._allocator
    caches = backend.allocate(7)
    assert allocator.allocated_bytes("kv_cache") == 7 * backend.block_bytes()
    values = 0 if spec.value_size is not None else spec.head_size
    least = backend.shape.block_size * spec.num_kv_heads * (spec.head_size + values) * itemsize
    assert least <= backend.block_bytes() <= 1.4 * least, "padding of an odd head size at most"
    assert (backend.block_bytes() == least) == (spec.head_size % 16 == 0 or not values or backend.shape.block_size == 8)
    assert len(caches) == 1


def test_random_steps(kernels: native.Kernels, count: Callable[..., int]) -> None:
    """Sequences that come, grow by chunks or single tokens, and share blocks: always the bits of the whole prompt."""
    rng = np.random.default_rng(1)
    for _ in range(count(2, full=40)):
        ratio, num_kv_heads = int(rng.choice([1, 2, 3, 5])), int(rng.choice([1, 2]))
        backend = make_backend(
            kernels,
            str(rng.choice(DTYPES)),
            num_heads=ratio * num_kv_heads,
            num_kv_heads=num_kv_heads,
            head_size=int(rng.choice([8, 16, 48])),
            block_size=int(rng.choice([4, 16, 32])),
        )
        num_blocks = -(-700 // backend.shape.block_size)
        prompts = [
            Prompt(backend, int(rng.integers(1, 700)), [1 + i * num_blocks + j for j in range(num_blocks)], i)
            for i in range(6)
        ]
        cache = new_cache(backend, 6 * num_blocks + 1)
        whole = [step(backend, cache, [(p, 0, len(p.q))])[0] for p in prompts]
        done = [0] * len(prompts)
        while any(n < len(p.q) for n, p in zip(done, prompts, strict=True)):
            parts, indices = [], []
            for i, prompt in enumerate(prompts):
                left = len(prompt.q) - done[i]
                if left and rng.random() < 0.7:
                    size = min(left, int(rng.choice([1, 5, 100, 400])))
                    parts.append((prompt, done[i], done[i] + size))
                    indices.append(i)
            if not parts:
                continue
            for i, (_, begin, end), found in zip(indices, parts, step(backend, cache, parts), strict=True):
                assert torch.equal(found, whole[i][begin:end])
                done[i] = end


def test_a_model_on_a_cache_of_8_bits_is_near_itself() -> None:
    """Text that it knows is about as likely, in half the memory; its own words come out whole."""
    text = "ROMEO: But soft! What light through yonder window breaks? It is the east, and Juliet is the sun."
    params = SamplingParams(max_tokens=8, prompt_logprobs=0, temperature=0)
    means, sizes = [], []
    for kv_dtype in ("auto", "fp8"):
        llm = LLM("demo", dtype="bfloat16", kv_cache_dtype=kv_dtype, num_blocks=64, platform="cpu")
        [output] = llm.generate([text], params, use_tqdm=False)
        assert len(output.outputs[0].token_ids) == 8
        found = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or ())[1:], strict=True)
        means.append(np.mean([best[token_id].logprob for token_id, best in found if best is not None]))
        sizes.append(llm.info.kv_cache_bytes)
    assert sizes[0] == 2 * sizes[1]
    assert 0 < abs(means[0] - means[1]) < 0.05
