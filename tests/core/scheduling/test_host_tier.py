"""The host tier alone, and when it pays."""

from collections.abc import Callable

import pytest

from fairlead.scheduling.host_tier import HostTier, SwapCosts
from fairlead.scheduling.prefix_cache import block_hash, root_hash

A, B, C, D = (block_hash(root_hash(""), [i]) for i in range(4))


def test_each_hash_gets_a_block_of_its_own() -> None:
    tier = HostTier(3)
    assert [tier.store(h) for h in (A, B, C)] == [0, 1, 2]
    assert dict(tier.blocks) == {A: 0, B: 1, C: 2}
    assert A in tier
    assert D not in tier
    tier.check_integrity()


def test_what_is_held_is_not_stored_again_but_counts_as_used() -> None:
    tier = HostTier(2)
    tier.store(A)
    tier.store(B)
    assert tier.store(A) is None
    assert tier.store(C) == 1  # in place of B
    assert list(tier.blocks) == [A, C]
    tier.check_integrity()


def test_without_blocks_nothing_is_stored() -> None:
    tier = HostTier(0)
    assert tier.store(A) is None
    assert A not in tier
    tier.check_integrity()


def test_a_taken_block_does_not_give_way_and_is_the_last_to_once_it_is_back() -> None:
    tier = HostTier(2)
    tier.store(A)
    tier.store(B)
    assert tier.take(A) == 0
    assert tier.store(C) == 1
    assert tier.take(C) == 1
    assert tier.store(D) is None  # no block is left
    with pytest.raises(AssertionError):
        tier.check_integrity()
    tier.put_back(C, 1)
    tier.put_back(A, 0)
    assert list(tier.blocks) == [C, A]
    assert tier.store(D) == 1
    tier.check_integrity()


def test_forgotten_blocks_are_free() -> None:
    tier = HostTier(2)
    tier.store(A)
    tier.store(B)
    tier.forget(A)
    tier.forget(D)
    assert list(tier.blocks) == [B]
    assert tier.store(C) == 0
    tier.clear()
    assert not tier.blocks
    tier.check_integrity()
    assert {tier.store(A), tier.store(B)} == {0, 1}


@pytest.mark.parametrize(
    "damage",
    [
        lambda tier: tier._free.pop(),
        lambda tier: tier._free.append(0),
        lambda tier: tier.put_back(B, 0),
    ],
)
def test_check_integrity_notices(damage: Callable[[HostTier], object]) -> None:
    tier = HostTier(3)
    tier.store(A)
    tier.check_integrity()
    damage(tier)
    with pytest.raises(AssertionError, match="a host block is lost"):
        tier.check_integrity()


COSTS = SwapCosts(out_s=(1.0, 0.5), in_s=(2.0, 0.5), overhead_s=3.0, token_s=0.5)


@pytest.mark.parametrize(
    ("num_blocks", "num_tokens", "pays"),
    [
        ((0, 0), 0, False),
        ((0, 0), 6, False),  # the overhead alone: as long as the six tokens
        ((0, 0), 7, True),
        ((1, 1), 11, False),
        ((1, 1), 12, True),
        ((4, 0), 22, False),
        ((4, 0), 23, True),
        ((0, 16), 23, True),  # a group's blocks cost what they cost there
    ],
)
def test_copying_back_pays_where_computing_takes_longer(
    num_blocks: tuple[int, int], num_tokens: int, pays: bool
) -> None:
    assert COSTS.pays(num_blocks, num_tokens) == pays


@pytest.mark.parametrize(("block_size", "pays"), [(1, False), (8, False), (9, True)])
def test_it_ever_pays_where_a_block_there_and_back_costs_less_than_its_tokens(block_size: int, pays: bool) -> None:
    """4 s a block of both groups, half a second a token; the overhead is nothing on a run that is long enough."""
    assert COSTS.ever_pays(block_size) == pays
