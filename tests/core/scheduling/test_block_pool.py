"""States of a pool's blocks: free, referenced, idle."""

from collections.abc import Callable

import pytest

from fairlead.scheduling.block_pool import BlockPool
from fairlead.scheduling.prefix_cache import block_hash, root_hash

A, B, C = (block_hash(root_hash(""), [i]) for i in range(3))


def test_blocks_are_handed_out_once_each_and_come_back() -> None:
    pool = BlockPool(3)
    assert (pool.num_blocks, pool.num_available, pool.num_referenced) == (3, 3, 0)
    blocks = [pool.allocate() for _ in range(3)]
    assert blocks == [0, 1, 2]
    assert (pool.num_available, pool.num_referenced) == (0, 3)
    with pytest.raises(KeyError):
        pool.allocate()
    pool.release(1)
    assert (pool.num_available, pool.num_referenced) == (1, 2)
    assert pool.allocate() == 1
    pool.check_integrity(blocks)


def test_a_block_is_held_until_its_last_reference_goes() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.reference(block)
    assert not pool.is_writable(block)
    pool.check_integrity([block, block])
    pool.release(block)
    assert pool.is_writable(block)
    assert pool.num_referenced == 1
    pool.release(block)
    assert pool.num_referenced == 0
    with pytest.raises(AssertionError):
        pool.release(block)


def test_a_cached_block_becomes_idle_and_busy_again() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.cache.publish(block, A)
    assert not pool.is_writable(block)
    assert pool.num_idle([block]) == 0
    pool.release(block)
    assert (pool.num_idle([block]), pool.cache.num_idle, pool.num_available) == (1, 1, 2)
    pool.check_integrity([])
    pool.reference(block)
    assert (pool.num_idle([block]), pool.cache.num_idle, pool.num_available) == (0, 0, 1)
    pool.check_integrity([block])


def test_free_blocks_go_first_then_the_idle_ones_in_order_of_last_use() -> None:
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(3)]
    for block, its_hash in zip(blocks, (A, B, C), strict=True):
        pool.cache.publish(block, its_hash)
    for block in (1, 0, 2):
        pool.release(block)
    assert [pool.allocate() for _ in range(4)] == [3, 1, 0, 2]
    assert pool.cache.get(A) is pool.cache.get(B) is pool.cache.get(C) is None
    pool.check_integrity(range(4))


def test_forgotten_blocks_are_free_unless_held() -> None:
    pool = BlockPool(3)
    held, idle = pool.allocate(), pool.allocate()
    pool.cache.publish(held, A)
    pool.cache.publish(idle, B)
    pool.release(idle)
    for its_hash in (A, B, C):
        pool.forget(its_hash)
    assert pool.cache.get(A) is pool.cache.get(B) is None
    assert pool.is_writable(held)
    assert (pool.cache.num_idle, pool.num_available) == (0, 2)
    pool.check_integrity([held])


def test_a_reset_frees_the_idle_and_leaves_the_held() -> None:
    pool = BlockPool(3)
    held, idle = pool.allocate(), pool.allocate()
    pool.cache.publish(held, A)
    pool.cache.publish(idle, B)
    pool.release(idle)
    pool.reset_cache()
    assert (pool.cache.num_idle, pool.num_available) == (0, 2)
    assert not pool.cache.hashes
    pool.check_integrity([held])


def _lose(pool: BlockPool) -> None:
    pool._free.pop()


def _free_twice(pool: BlockPool) -> None:
    pool._free.append(pool._free[0])


def _free_a_used_one(pool: BlockPool) -> None:
    pool._free.append(0)


def _free_a_cached_one(pool: BlockPool) -> None:
    pool._free.append(1)


def _miscount(pool: BlockPool) -> None:
    pool._refs[pool._free[0]] += 1


def _forget_that_it_is_idle(pool: BlockPool) -> None:
    pool.cache._idle.clear()


@pytest.mark.parametrize(
    "damage", [_lose, _free_twice, _free_a_used_one, _free_a_cached_one, _miscount, _forget_that_it_is_idle]
)
def test_check_integrity_notices(damage: Callable[[BlockPool], None]) -> None:
    pool = BlockPool(5)
    held, idle = pool.allocate(), pool.allocate()
    pool.cache.publish(idle, A)
    pool.release(idle)
    pool.check_integrity([held])
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity([held])


def test_check_integrity_compares_with_the_tables() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    for held in ([], [block, block], [1 - block]):
        with pytest.raises(AssertionError, match="a reference count differs"):
            pool.check_integrity(held)
