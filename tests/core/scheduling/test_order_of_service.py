"""Who is served first, and how much of a step a prompt gets."""

import pytest
from fake_worker import Engine, starts

from fairlead.interface import QueuedRequest
from fairlead.scheduling.policy import FirstComeFirstServed, Priority

PRIORITY = Priority(aging_s=10)


def ids(engine: Engine) -> list[str]:
    return [s.request.request_id for s in engine.scheduler.running]


def queued(priority: int = 0, arrival_s: float = 0.0) -> QueuedRequest:
    return QueuedRequest(arrival_s=arrival_s, priority=priority, num_prompt_tokens=1, max_tokens=None, cache_salt="")


def test_keys() -> None:
    assert FirstComeFirstServed().key(queued(5)) == FirstComeFirstServed().key(queued(-5, 7.0))
    assert PRIORITY.key(queued(-1, 5.0)) < PRIORITY.key(queued(0, 0.0)) < PRIORITY.key(queued(0, 1.0))
    assert PRIORITY.key(queued(0, 0.0)) < PRIORITY.key(queued(-1, 10.5)), (
        "it has waited for longer than a level is worth"
    )


def test_a_lower_number_is_admitted_first() -> None:
    engine = Engine(max_num_seqs=1, policy=PRIORITY)
    for name, priority in (("c", 1), ("b", 0), ("a", -1), ("d", 1)):
        engine.add(name, 3, priority=priority, max_tokens=2)
    engine.run()
    assert [name for name, _ in engine.ends] == ["a", "b", "c", "d"]


def test_waiting_outweighs_priority_in_the_end() -> None:
    engine = Engine(max_num_seqs=1, policy=PRIORITY)
    engine.add("patient", 3, priority=2, max_tokens=1)
    for i in range(5):
        engine.add(f"urgent {i}", 3, max_tokens=1)
        engine.step()
        engine.now_s += 7
    assert [name for name, _ in engine.ends] == ["urgent 0", "urgent 1", "urgent 2", "patient", "urgent 3"]


def test_who_goes_first_takes_the_seat_of_the_last_in_line() -> None:
    engine = Engine(max_num_seqs=2, policy=PRIORITY)
    engine.add("a", 3, max_tokens=6)
    engine.add("b", 3, priority=1, max_tokens=6)
    engine.step()
    engine.add("urgent", 3, priority=-1, max_tokens=2)
    engine.step()
    assert ids(engine) == ["urgent", "a"]
    assert engine.stats.num_preemptions == 1
    engine.run()
    assert list(engine.ends) == [("urgent", 0), ("a", 0), ("b", 0)]
    assert all(tokens == [100] * len(tokens) for tokens in engine.tokens.values())


def test_who_goes_first_takes_the_memory_of_the_last_in_line() -> None:
    engine = Engine(num_blocks=6, max_model_len=24, caching=False, policy=PRIORITY)
    engine.add("a", 7, max_tokens=3)
    engine.add("b", 7, priority=1, max_tokens=3)
    engine.step()
    engine.add("urgent", 15, priority=-1, max_tokens=2)
    engine.step()
    assert ids(engine) == ["urgent", "a"]
    engine.run()
    assert list(engine.ends) == [("urgent", 0), ("a", 0), ("b", 0)]


def test_a_prompt_that_runs_leaves_tokens_to_who_goes_first() -> None:
    engine = Engine(budget=8, caching=False, policy=PRIORITY)
    engine.add("long", 40, priority=1)
    assert starts(engine.step()) == [(0, 8)]
    engine.add("urgent", 5, priority=0, max_tokens=1)
    assert sorted(starts(engine.step())) == [(0, 5), (8, 3)]
    assert list(engine.ends) == [("urgent", 0)]


def test_an_equal_or_lower_one_takes_nothing() -> None:
    engine = Engine(max_num_seqs=1, policy=PRIORITY)
    engine.add("a", 3, max_tokens=3)
    engine.step()
    engine.add("b", 3, max_tokens=1)
    engine.run()
    assert engine.stats.num_preemptions == 0
    assert list(engine.ends) == [("a", 0), ("b", 0)]


def test_a_long_prompt_gets_so_many_tokens_a_step_and_others_start_beside_it() -> None:
    engine = Engine(budget=16, max_chunk=4, caching=False)
    engine.add("long", 10, max_tokens=1)
    engine.add("longer", 11, max_tokens=1)
    engine.add("short", 2, max_tokens=3)
    assert starts(engine.step()) == [(0, 4), (0, 4), (0, 2)]
    assert starts(engine.step()) == [(4, 4), (4, 4), (2, 1)]
    assert starts(engine.step()) == [(8, 2), (8, 3), (3, 1)]
    assert len(engine.ends) == 3


def test_what_prompts_amid_their_way_still_need_is_not_given_to_others() -> None:
    engine = Engine(num_blocks=8, max_model_len=32, budget=16, max_chunk=4, caching=False)
    engine.add("long", 20, max_tokens=1)
    engine.add("longer", 21, max_tokens=1)
    assert starts(engine.step()) == [(0, 4)]  # five blocks of eight are its own, though it has but one
    engine.run()
    assert engine.stats.num_preemptions == 0


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_everyone_who_runs_gets_a_token_before_a_prompt_gets_more(budget: int) -> None:
    engine = Engine(budget=8, caching=False, max_num_seqs=4, max_chunk=2)
    engine.add("prompt", 30)
    for i in range(budget):
        engine.add(str(i), [i], max_tokens=20)
    engine.step()
    engine.scheduler.max_num_batched_tokens = budget + 1
    batch = engine.step()
    assert starts(batch) == [(2, 1)] + [(1, 1)] * budget
