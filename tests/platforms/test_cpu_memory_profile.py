"""What the CPU says a piece of work took: exact to a few megabytes, whoever else is on the machine."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fairlead.interface import MemoryProfile
from fairlead_cpu import memory_profile

MIB = 2**20
SLACK_BYTES = 8 * MIB  # arenas, and pages of code that the work is the first to touch
BATCH_BYTES = MIB  # Linux counts a process's pages in batches of some dozens per processor
METHODS = ["high water mark", "sampling"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to measure, where this system has them."""
    if memory_profile._read("VmRSS") is None:
        pytest.skip("this system has no /proc/self/status")
    if request.param == "sampling":
        monkeypatch.setattr(memory_profile, "_reset_high_water_mark", lambda: False)
    elif not memory_profile._reset_high_water_mark():
        pytest.skip("this system does not let a process reset its high-water mark")
    return str(request.param)


def take(num_bytes: int) -> bytearray:
    """Memory whose pages are written."""
    taken = bytearray(num_bytes)
    taken[::4096] = b"x" * len(taken[::4096])
    return taken


def measured(work: Callable[[], None]) -> MemoryProfile:
    found = memory_profile.profile(work)
    assert found is not None
    return found


def test_what_is_freed_again_counts_at_its_peak(method: str) -> None:
    def work() -> None:
        taken = take(96 * MIB)
        time.sleep(0.05)  # long enough for a sample
        del taken
        time.sleep(0.05)

    found = measured(work)
    assert 96 * MIB - BATCH_BYTES <= found.peak_bytes <= 96 * MIB + SLACK_BYTES
    assert found.kept_bytes <= SLACK_BYTES


def test_what_is_kept_is_told_apart(method: str) -> None:
    kept: list[bytearray] = []

    def work() -> None:
        kept.append(take(32 * MIB))
        taken = take(64 * MIB)
        time.sleep(0.05)
        del taken

    found = measured(work)
    assert 96 * MIB - BATCH_BYTES <= found.peak_bytes <= 96 * MIB + SLACK_BYTES
    assert 32 * MIB - BATCH_BYTES <= found.kept_bytes <= 32 * MIB + SLACK_BYTES


def test_an_earlier_peak_does_not_count(method: str) -> None:
    earlier = take(200 * MIB)
    del earlier
    found = measured(lambda: None)
    assert found.peak_bytes <= SLACK_BYTES


def test_memory_that_was_freed_before_serves_no_work_unseen(method: str) -> None:
    """Small blocks, which the allocator of C keeps for itself when they are freed."""
    pieces = [bytes(1000) for _ in range(64_000)]
    pieces.append(bytes(1000))
    del pieces
    held: list[list[bytes]] = []
    found = measured(lambda: held.append([bytes(1000) for _ in range(64_000)]))
    assert found.peak_bytes >= 48 * MIB


def test_memory_given_back_meanwhile_is_no_fault(method: str) -> None:
    held = [take(64 * MIB)]
    found = measured(held.clear)
    assert (found.peak_bytes <= SLACK_BYTES, found.kept_bytes) == (True, 0)


def test_what_the_work_raises_goes_on_and_no_thread_stays(method: str) -> None:
    num_threads = threading.active_count()

    def work() -> None:
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        memory_profile.profile(work)
    assert threading.active_count() == num_threads


def test_a_system_without_an_account_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_profile, "_STATUS", tmp_path / "status")
    done: list[bool] = []
    assert memory_profile.profile(lambda: done.append(True)) is None
    assert done == [True]


def test_a_mark_that_cannot_be_reset_is_sampled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_profile, "_CLEAR_REFS", tmp_path / "no" / "clear_refs")
    assert not memory_profile._reset_high_water_mark()


@pytest.mark.parametrize(("peak", "kept"), [(-1, 0), (0, -1), (1, 2)])
def test_a_profile_that_cannot_be_is_refused(peak: int, kept: int) -> None:
    with pytest.raises(ValueError, match="keeps between 0 and its peak"):
        MemoryProfile(peak_bytes=peak, kept_bytes=kept)
