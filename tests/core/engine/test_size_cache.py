"""Every cache group gets enough blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.config import CacheConfig
from fairlead.engine.planner import Negotiated, size_cache
from fairlead.errors import KVCacheMemoryError
from fairlead.interface import MemoryInfo
from fairlead.scheduling.block_manager import blocks_per_sequence
from fairlead_cpu import plugin
from fairlead_cpu.platform import CpuPlatform

GROUPS = st.lists(st.tuples(st.none() | st.integers(1, 5000), st.integers(1, 10_000)), min_size=1, max_size=3)


class Roomy(CpuPlatform):
    """More memory than any test asks for."""

    def memory_info(self) -> MemoryInfo:
        return MemoryInfo(total_bytes=2**50, free_bytes=2**50)


def make_settings(max_model_len: int, block_size: int, chunk: int, max_num_seqs: int) -> Negotiated:
    return Negotiated(
        dtype="float32",
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=chunk,
        attention_backend="sdpa",
        kv_dtype="auto",
        device_memory_utilization=0.5,
        async_scheduling=False,
    )


@given(
    groups=GROUPS,
    max_model_len=st.integers(2, 5000),
    block_size=st.sampled_from([1, 8, 16, 128]),
    chunk=st.integers(1, 5000),
    max_num_seqs=st.integers(1, 300),
    sequences=st.floats(0.5, 400),
)
def test_every_group_holds_the_longest_sequence(
    groups: list[tuple[int | None, int]],
    max_model_len: int,
    block_size: int,
    chunk: int,
    max_num_seqs: int,
    sequences: float,
) -> None:
    """Or the cache is refused. What was asked for is not exceeded."""
    windows, block_bytes = [w for w, _ in groups], [size for _, size in groups]
    settings = make_settings(max_model_len, block_size, chunk, max_num_seqs)
    platform = Roomy(plugin.probe()[0])
    needed = [blocks_per_sequence(window, max_model_len, block_size, chunk) for window in windows]
    needed_bytes = sum(n * size for n, size in zip(needed, block_bytes, strict=True))
    memory = max(1, int(needed_bytes * sequences))
    config = CacheConfig(kv_cache_memory=memory)
    if memory < needed_bytes:
        with pytest.raises(KVCacheMemoryError):
            size_cache(config, settings, platform, windows, block_bytes, 0)
        return
    num_blocks = size_cache(config, settings, platform, windows, block_bytes, 0)
    assert all(n <= got for n, got in zip(needed, num_blocks, strict=True))
    assert sum(n * size for n, size in zip(num_blocks, block_bytes, strict=True)) <= memory


@pytest.mark.parametrize("num_blocks", [4, 5, 6, 100])
def test_a_number_of_blocks_is_that_of_the_largest_group(num_blocks: int) -> None:
    """16 tokens are 4 blocks, of a window of 4 in chunks of 1 they are 2."""
    settings = make_settings(16, 4, 1, 300)
    platform = CpuPlatform(plugin.probe()[0])
    full, windowed = size_cache(CacheConfig(num_blocks=num_blocks), settings, platform, [None, 4], [100, 100], 0)
    assert full == num_blocks
    assert windowed in (num_blocks // 2, -(-num_blocks // 2))
    with pytest.raises(KVCacheMemoryError):
        size_cache(CacheConfig(num_blocks=3), settings, platform, [None, 4], [100, 100], 0)
