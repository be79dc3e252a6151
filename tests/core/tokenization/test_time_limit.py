"""Code that does not end is ended in its own thread, and nothing comes later."""

import threading
import time

import pytest

from fairlead.tokenization.time_limit import TimeLimitError, time_limit


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_what_does_not_end_is_ended_and_others_go_on() -> None:
    ended: list[str] = []

    def other(name: str, limit: float, seconds: float) -> None:
        try:
            with time_limit(limit):
                spin(seconds)
            spin(0.1)  # nothing is raised any more
            ended.append(f"{name} passed")
        except TimeLimitError:
            ended.append(f"{name} was ended")

    threads = [threading.Thread(target=other, args=a) for a in (("long", 0.05, 60.0), ("short", 60.0, 0.05))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(ended) == ["long was ended", "short passed"]


def test_waiting_is_no_computing() -> None:
    with time_limit(0.05):
        time.sleep(0.3)


def test_an_error_of_the_block_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError), time_limit(5):
        _ = 1 / 0
