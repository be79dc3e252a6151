"""Hashes of token prefixes, the two-way map and the order of eviction."""

import pytest

from fairlead.scheduling.prefix_cache import PrefixCache, block_hash, root_hash

ROOT = root_hash("")
A, B, C = (block_hash(ROOT, [i]) for i in range(3))


def cache_of(*blocks: tuple[int, bytes]) -> PrefixCache:
    """Published blocks that have become idle in this order."""
    cache = PrefixCache()
    for block, its_hash in blocks:
        cache.publish(block, its_hash)
        cache.set_idle(block)
    return cache


def test_a_hash_tells_salts_parents_tokens_and_their_order_apart() -> None:
    hashes = [
        block_hash(ROOT, [1, 2]),
        block_hash(ROOT, [2, 1]),
        block_hash(ROOT, [1]),
        block_hash(ROOT, [1, 2, 0]),
        block_hash(ROOT, [1, 2 + 2**32]),
        block_hash(root_hash("tenant"), [1, 2]),
        block_hash(block_hash(ROOT, [1]), [2]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert block_hash(root_hash(""), (1, 2)) == hashes[0]


def test_a_published_block_is_found_by_its_hash() -> None:
    cache = PrefixCache()
    assert cache.get(A) is None
    assert 5 not in cache
    cache.publish(5, A)
    assert cache.get(A) == 5
    assert 5 in cache
    assert cache.num_idle == 0


def test_the_first_block_keeps_a_hash() -> None:
    cache = PrefixCache()
    cache.publish(5, A)
    cache.publish(6, A)
    assert cache.get(A) == 5
    assert 6 not in cache


def test_a_block_has_one_hash() -> None:
    cache = PrefixCache()
    cache.publish(5, A)
    with pytest.raises(AssertionError):
        cache.publish(5, B)


def test_the_least_recently_used_idle_block_is_evicted_first() -> None:
    cache = cache_of((1, A), (2, B), (3, C))
    cache.set_busy(1)
    cache.set_idle(1)  # used again: now the last in line
    assert [cache.evict() for _ in range(3)] == [(2, B), (3, C), (1, A)]
    assert cache.get(A) is cache.get(B) is cache.get(C) is None
    with pytest.raises(KeyError):
        cache.evict()


def test_a_busy_block_is_never_evicted() -> None:
    cache = cache_of((1, A), (2, B))
    cache.set_busy(1)
    assert cache.num_idle == 1
    assert cache.evict() == (2, B)
    with pytest.raises(KeyError):
        cache.evict()
    assert cache.get(A) == 1


def test_a_forgotten_block_is_not_found_and_free_if_it_was_idle() -> None:
    cache = cache_of((3, C))
    cache.publish(1, A)
    assert cache.hashes == {3: C, 1: A}
    assert cache.forget(A) is None  # still referenced
    assert cache.forget(A) is cache.forget(B) is None  # not there
    assert cache.get(A) is None
    assert 1 not in cache
    cache.publish(2, A)
    assert cache.get(A) == 2
    assert cache.forget(C) == 3
    assert (cache.num_idle, cache.hashes) == (0, {2: A})
    cache.check_integrity([0, 0, 1, 0])


def test_clear_forgets_all_and_returns_the_idle() -> None:
    cache = cache_of((1, A), (2, B), (3, C))
    cache.set_busy(2)
    assert cache.clear() == [1, 3]
    assert cache.get(B) is None
    assert 2 not in cache
    assert cache.num_idle == 0
    cache.check_integrity([0, 0, 1, 0])


def test_check_integrity_notices_a_wrong_state() -> None:
    cache = cache_of((0, A), (1, B))
    cache.check_integrity([0, 0])
    with pytest.raises(AssertionError):
        cache.check_integrity([0, 1])  # referenced, yet idle
    cache.set_busy(1)
    with pytest.raises(AssertionError):
        cache.check_integrity([0, 0])  # unreferenced, yet not idle
    cache.check_integrity([0, 1])
    del cache._block_by_hash[A]
    with pytest.raises(AssertionError):
        cache.check_integrity([0, 1])
