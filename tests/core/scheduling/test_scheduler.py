"""The scheduler step by step: batching, chunks, hits, forks, preemption, ends. Token 100 is sampled unless told."""

from typing import Any

import pytest
from fake_worker import EOS, Engine, Outcome, starts, table

from fairlead.request import EngineStats, FinishReason, Request, SamplingParams, TokenLogprobs
from fairlead.scheduling.batch import SampledToken, ScheduledBatch
from fairlead.scheduling.scheduler import NAN_ERROR


def test_an_idle_scheduler_has_an_empty_step() -> None:
    engine = Engine()
    assert not engine.scheduler.has_work
    assert engine.scheduler.schedule() == ScheduledBatch(chunks=(), block_copies=())


def test_a_request_that_arrives_mid_decode_gets_a_token_before_older_ones_end() -> None:
    engine = Engine()
    engine.add("old", 8, max_tokens=20)
    for _ in range(5):
        engine.step()
    engine.add("new", [50, 51, 52])
    batch = engine.step()
    assert starts(batch) == [(12, 1), (0, 3)]
    assert len(engine.tokens["new", 0]) == 1
    assert not engine.ends


def test_chunked_prefill_never_exceeds_the_budget_nor_stops_a_stream() -> None:
    engine = Engine(budget=8, caching=False)
    engine.add("stream", 3, max_tokens=50)
    engine.step()
    engine.add("long", 30, max_tokens=2)
    engine.add("late", 30, max_tokens=2)
    assert starts(engine.step()) == [(3, 1), (0, 7)]
    assert starts(engine.step()) == [(4, 1), (7, 7)]
    for _ in range(2):
        engine.step()
    assert len(engine.tokens["stream", 0]) == 5
    assert ("long", 0) not in engine.tokens
    assert starts(engine.step()) == [(7, 1), (28, 2), (0, 5)]  # what is left goes to the next in line
    assert engine.tokens["long", 0] == [100]


def test_a_chunk_samples_only_at_the_last_known_token() -> None:
    engine = Engine(budget=4)
    engine.add("a", 6)
    first, second = engine.step().chunks[0], engine.step().chunks[0]
    assert (first.sample_seed, first.position, first.token_ids) == (None, 4, (10, 11, 12, 13))
    assert (second.sample_seed, second.position, second.token_ids) == (0, 6, (14, 15))
    assert second.params is first.params
    third = engine.step().chunks[0]
    assert (third.sample_seed, third.position, third.token_ids) == (0, 7, (100,))


def test_more_sequences_than_budget_are_served_oldest_first() -> None:
    engine = Engine(budget=2)
    engine.add("a", 2, n=4, max_tokens=3)
    engine.step()
    assert [c.seq_id for c in engine.step().chunks] == [0, 1]
    engine.run()
    assert sorted(engine.ends) == [("a", i) for i in range(4)]


def test_no_more_sequences_run_than_allowed() -> None:
    engine = Engine(max_num_seqs=2)
    for name in "abc":
        engine.add(name, 3, max_tokens=4)
    assert len(engine.step().chunks) == 2
    assert (engine.stats.num_requests_running, engine.stats.num_requests_waiting) == (2, 1)
    engine.run()
    assert len(engine.ends) == 3


def test_seats_are_kept_for_the_siblings_to_come() -> None:
    engine = Engine(max_num_seqs=4)
    engine.add("fork", 3, n=3, max_tokens=3)
    engine.add("a", 3)
    engine.add("b", 3)
    assert [c.seq_id for c in engine.step().chunks] == [0, 128]  # "a" takes the fourth, "b" waits
    assert len(engine.step().chunks) == 4
    engine.run()
    assert len(engine.ends) == 5


def test_the_second_identical_prompt_hits_the_cache_and_says_so() -> None:
    engine = Engine()
    engine.add("first", 10, max_tokens=1)
    engine.step()
    assert engine.deltas[0].num_cached_tokens == 0
    engine.add("second", 10, max_tokens=1)
    assert starts(engine.step()) == [(8, 2)]
    assert engine.deltas[0].num_cached_tokens == 8
    stats = engine.stats
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (20, 8)
    assert (stats.num_prompt_tokens, stats.num_cached_prompt_tokens) == (20, 8)


def test_a_prefix_is_shared_within_one_step() -> None:
    engine = Engine()
    engine.add("a", 10)
    engine.add("b", [*range(10, 18), 77, 78])
    batch = engine.step()
    assert starts(batch) == [(0, 10), (8, 2)]
    assert table(batch, 0)[:2] == table(batch, 1)[:2]
    assert batch.num_tokens == 12


def test_salts_isolate() -> None:
    engine = Engine()
    engine.add("a", 10)
    engine.add("b", 10, salt="tenant")
    engine.add("c", 10, salt="tenant")
    batch = engine.step()
    assert starts(batch) == [(0, 10), (0, 10), (8, 2)]
    assert not set(table(batch, 0)) & set(table(batch, 1))


@pytest.mark.parametrize("length", [7, 8, 9])
def test_forks_copy_where_they_part(length: int) -> None:
    engine = Engine()
    engine.add("a", length, n=3, max_tokens=4)
    engine.step()
    assert list(engine.tokens) == [("a", 0)]
    batch = engine.step(lambda i: 100 + i)
    assert starts(batch) == [(length, 1), (length - 1, 1), (length - 1, 1)]
    assert len({c.sample_seed for c in batch.chunks}) == 3
    assert len(batch.block_copies) == {7: 2, 8: 2, 9: 0}[length]
    assert {key: tokens[-1] for key, tokens in engine.tokens.items()} == {("a", i): 100 + i for i in range(3)}
    engine.run()
    assert [len(t) for t in engine.tokens.values()] == [4, 4, 4]
    assert engine.stats.num_generation_tokens == 12
    assert engine.stats.num_prompt_tokens == length  # once, not once a sibling


def test_the_seeds_of_siblings_differ_and_have_64_bits() -> None:
    engine = Engine(num_blocks=128, max_num_seqs=128, budget=128)
    request = Request(request_id="a", prompt_token_ids=(10,), params=SamplingParams(n=128))
    engine.scheduler.add(request, seed=2**64 - 1)
    seeds = [engine.step().chunks[0].sample_seed]
    seeds += [chunk.sample_seed for chunk in engine.step().chunks[1:]]
    assert len(set(seeds)) == 128
    assert all(seed is not None and 0 <= seed < 2**64 for seed in seeds)


def test_siblings_of_a_hit_report_it() -> None:
    engine = Engine()
    engine.add("first", 10, max_tokens=1)
    engine.step()
    engine.add("second", 10, n=2, max_tokens=1)
    engine.step()
    engine.step()
    assert [d.num_cached_tokens for d in engine.deltas] == [8]
    assert engine.deltas[0].index == 1


def test_preemption_takes_the_newest_and_the_oldest_always_progresses() -> None:
    engine = Engine(num_blocks=6, max_model_len=24, caching=False)
    for name in "abc":
        engine.add(name, 7, max_tokens=15)
    order: list[list[int]] = []
    while engine.scheduler.has_work:
        oldest = min(s.seq_id for s in [*engine.scheduler.running, *engine.scheduler.waiting])
        batch = engine.step()
        assert batch.chunks[0].seq_id == oldest
        order.append([c.seq_id // 128 for c in batch.chunks])
    assert order[:4] == [[0, 1, 2], [0, 1, 2], [0, 1], [0, 1]]  # at the third step a third block each does not fit
    assert engine.stats.num_preemptions > 1
    assert list(engine.ends.values()) == [(FinishReason.LENGTH, None)] * 3
    assert list(engine.ends) == [("a", 0), ("b", 0), ("c", 0)]
    assert all(tokens == [100] * 15 for tokens in engine.tokens.values())


def test_a_preempted_sequence_computes_all_its_tokens_again_and_keeps_its_seed() -> None:
    engine = Engine(num_blocks=4, max_model_len=16, caching=False)
    engine.add("a", 7, max_tokens=3)
    engine.add("b", 7, max_tokens=3)
    seed = engine.step().chunks[1].sample_seed
    engine.step()
    assert starts(engine.step()) == [(8, 1)]  # "a" took a third block: "b" is out, and nothing is admitted behind it
    assert engine.stats.num_preemptions == 1
    batch = engine.step()
    assert starts(batch) == [(0, 9)]
    assert batch.chunks[0].token_ids == (*range(10, 17), 100, 100)
    assert batch.chunks[0].sample_seed == seed
    assert engine.tokens["b", 0] == [100] * 3
    assert engine.deltas[0].num_cached_tokens == 0


def test_a_preempted_sequence_may_hit_its_own_blocks_and_reports_its_first_hits() -> None:
    engine = Engine(num_blocks=4, max_model_len=16)
    engine.add("a", 7, max_tokens=3)
    engine.add("b", [50, *range(11, 17)], max_tokens=3)
    for _ in range(3):
        engine.step()
    assert engine.stats.num_preemptions == 1
    assert starts(engine.step()) == [(4, 5)]  # one of its two blocks went to "a", the later one
    assert engine.deltas[0].num_cached_tokens == 0
    assert engine.stats.num_prefix_queries == 14


def test_a_prompt_that_does_not_fit_waits_and_holds_its_place() -> None:
    engine = Engine(num_blocks=4, max_model_len=16)
    engine.add("a", 9, max_tokens=2)
    engine.add("big", range(30, 42), max_tokens=1)
    engine.add("small", [60], max_tokens=1)
    assert len(engine.step().chunks) == 1
    engine.run()
    assert list(engine.ends) == [("a", 0), ("big", 0), ("small", 0)]


ENDS: list[tuple[dict[str, Any], int, list[int], Outcome]] = [
    ({}, 5, [100, EOS], (FinishReason.STOP, None)),
    ({"stop_token_ids": (7, 9)}, 5, [100, 9], (FinishReason.STOP, 9)),
    ({"stop_token_ids": (EOS,)}, 5, [100, EOS], (FinishReason.STOP, None)),
    ({"stop_token_ids": (EOS,), "ignore_eos": True}, 5, [100, EOS], (FinishReason.STOP, EOS)),
    ({"ignore_eos": True, "max_tokens": 3}, 5, [EOS, EOS, EOS], (FinishReason.LENGTH, None)),
    ({"max_tokens": 1}, 5, [100], (FinishReason.LENGTH, None)),
    ({"max_tokens": 1}, 5, [EOS], (FinishReason.STOP, None)),
    ({"max_tokens": None}, 5, [100] * 59, (FinishReason.LENGTH, None)),
    ({"max_tokens": 100}, 63, [100], (FinishReason.LENGTH, None)),
]


@pytest.mark.parametrize(("params", "prompt", "sampled", "end"), ENDS)
def test_why_a_sequence_ends(params: dict[str, Any], prompt: int, sampled: list[int], end: Outcome) -> None:
    engine = Engine()
    engine.add("a", prompt, **params)
    for token in sampled:
        assert not engine.ends
        engine.step(lambda i, token=token: token)  # type: ignore[misc]
    assert engine.ends == {("a", 0): end}
    assert engine.tokens["a", 0] == sampled
    assert not engine.scheduler.has_work
    assert engine.stats.kv_cache_usage == 0


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_logprobs_pass_through(max_tokens: int) -> None:
    engine = Engine()
    engine.add("a", 3, logprobs=1, max_tokens=max_tokens)
    logprobs = TokenLogprobs(token_ids=(5,), logprobs=(-0.5,), rank=1)
    batch = engine.scheduler.schedule()
    (delta,) = engine.scheduler.update(batch, [SampledToken(token_id=5, logprobs=logprobs)])
    assert delta.logprobs == (logprobs,)


def test_nan_ends_one_sequence_with_an_error_and_its_blocks_are_not_trusted() -> None:
    engine = Engine()
    engine.add("bad", 10)
    engine.add("good", [50, 51], max_tokens=2)
    engine.step(lambda i: None if i == 0 else 100)
    error = engine.deltas[0]
    assert (error.finish_reason, error.error, error.token_ids) == (FinishReason.ERROR, NAN_ERROR, ())
    assert (engine.stats.num_nan_sequences, engine.stats.num_generation_tokens) == (1, 1)
    engine.add("again", 10, max_tokens=1)
    assert starts(engine.step()) == [(2, 1), (0, 10)]
    assert engine.tokens["again", 0] == [100]


def test_an_error_of_a_sequences_own_leaves_its_blocks_to_others() -> None:
    """A logits processor that raised says nothing about the keys and values."""
    engine = Engine()
    engine.add("bad", 10)
    batch = engine.scheduler.schedule()
    (delta,) = engine.scheduler.update(batch, [SampledToken(token_id=None, error="the processor raised")])
    assert (delta.finish_reason, delta.error) == (FinishReason.ERROR, "the processor raised")
    stats = engine.scheduler.stats()
    assert (stats.num_nan_sequences, stats.num_generation_tokens) == (0, 0)
    engine.add("again", 10, max_tokens=1)
    assert starts(engine.step()) == [(8, 2)]


def test_nan_in_the_first_of_several_leaves_the_others() -> None:
    engine = Engine()
    engine.add("a", 5, n=3, max_tokens=2)
    engine.step(lambda i: None)
    engine.run()
    assert engine.ends[("a", 0)][0] is FinishReason.ERROR
    assert [engine.ends["a", i][0] for i in (1, 2)] == [FinishReason.LENGTH] * 2


def test_abort_while_waiting() -> None:
    engine = Engine(max_num_seqs=1)
    engine.add("a", 5, max_tokens=2)
    engine.add("b", 5)
    engine.step()
    engine.scheduler.abort("b", 0)
    engine.scheduler.check_integrity()
    engine.run()
    assert list(engine.ends) == [("a", 0)]


def test_abort_amid_the_prompt() -> None:
    engine = Engine(budget=4)
    engine.add("a", 10)
    engine.step()
    engine.scheduler.abort("a")
    assert not engine.scheduler.has_work
    assert engine.stats.kv_cache_usage == 0


def test_abort_while_decoding_twice_and_of_the_unknown() -> None:
    engine = Engine()
    engine.add("a", 5)
    engine.step()
    for request_id in ("a", "a", "unknown"):
        engine.scheduler.abort(request_id)
    assert not engine.scheduler.has_work
    assert engine.deltas[0].finish_reason is None
    engine.add("a", 5)  # the id is free again


def test_abort_while_preempted() -> None:
    engine = Engine(num_blocks=4, max_model_len=16, caching=False)
    engine.add("a", 7, max_tokens=5)
    engine.add("b", 7, max_tokens=5)
    for _ in range(3):
        engine.step()
    assert [s.request.request_id for s in engine.scheduler.waiting] == ["b"]
    engine.scheduler.abort("b")
    engine.run()
    assert list(engine.ends) == [("a", 0)]


def test_abort_during_a_step_passes_over_what_it_sampled() -> None:
    engine = Engine()
    for name in "abc":
        engine.add(name, [ord(name)])
    engine.step(lambda i: 100 + i, during=lambda: engine.scheduler.abort("b"))
    assert engine.tokens == {("a", 0): [100], ("c", 0): [102]}


def test_abort_of_one_sibling_leaves_the_others() -> None:
    engine = Engine()
    engine.add("a", 5, n=3, max_tokens=4)
    engine.scheduler.abort("a", 0)  # not yet a sequence of its own
    engine.step()
    engine.scheduler.abort("a", 0)
    engine.scheduler.abort("a", 2)
    engine.run()
    assert list(engine.ends) == [("a", 1)]


def test_abort_all_ends_everything_and_forgets_prefixes() -> None:
    engine = Engine(max_num_seqs=2)
    engine.add("a", 10, n=2)
    engine.add("b", 10)
    engine.step()
    engine.scheduler.schedule()  # the step fails
    assert engine.scheduler.abort_all() == ["a", "b"]
    assert not engine.scheduler.has_work
    engine.scheduler.check_integrity()
    engine.add("c", 10)
    assert starts(engine.step()) == [(0, 10)]


def test_an_id_is_used_once_at_a_time() -> None:
    engine = Engine()
    engine.add("a", 5)
    with pytest.raises(ValueError, match="request id 'a' is in use"):
        engine.add("a", 5)


def test_gauges_follow_the_queues() -> None:
    engine = Engine(num_blocks=10, max_num_seqs=2, max_model_len=40)
    assert engine.stats == EngineStats()
    engine.add("a", 10, n=2, max_tokens=2)
    engine.add("b", [1], max_tokens=1)
    assert (engine.stats.num_requests_running, engine.stats.num_requests_waiting) == (0, 2)
    engine.step()
    assert (engine.stats.num_requests_running, engine.stats.num_requests_waiting) == (1, 1)
    assert engine.stats.kv_cache_usage == pytest.approx(0.3)
    engine.run()
    stats = engine.stats
    assert (stats.num_requests_running, stats.num_requests_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert (stats.num_prompt_tokens, stats.num_generation_tokens, stats.num_preemptions) == (11, 5, 0)
    assert stats.num_steps == 3
    # a's prompt; a's second token beside the prompt's last, where its sibling starts; the sibling's second, b's prompt
    assert stats.num_scheduled_tokens == 10 + 2 + 2


def test_a_request_starts_once_and_its_prompt_is_counted_once() -> None:
    engine = Engine(num_blocks=6, max_model_len=20, caching=False)
    engine.add("a", 8, max_tokens=6)
    engine.add("b", 8, max_tokens=6)
    engine.step()
    assert engine.scheduler.take_started() == ["a", "b"]
    assert engine.scheduler.take_started() == []
    engine.step()
    engine.step()
    engine.add("late", [1], max_tokens=1)
    started: list[str] = []
    while engine.scheduler.has_work:
        engine.step()
        started += engine.scheduler.take_started()
    assert engine.stats.num_preemptions
    assert started == ["late"], "one that comes back after a preemption has started before"
    assert engine.stats.num_prefix_queries == 17


def test_the_pool_must_hold_the_longest_sequence() -> None:
    engine = Engine(num_blocks=1, max_model_len=16)
    engine.add("a", 8)
    with pytest.raises(AssertionError, match="nothing can be scheduled"):
        engine.step()


def test_a_window_holds_a_long_prompt_in_few_blocks() -> None:
    engine = Engine(num_blocks=5, windows=[6], budget=8, max_model_len=64)
    engine.add("a", 50, max_tokens=10)
    held = []
    while engine.scheduler.has_work:
        batch = engine.step()
        ((first, blocks),) = batch.chunks[0].block_tables
        held.append((first, len(blocks)))
    assert held[:7] == [(0, 2), (0, 4), (2, 4), (4, 4), (6, 4), (8, 4), (10, 3)]
    assert max(n for _, n in held[7:]) == 3
    assert engine.ends == {("a", 0): (FinishReason.LENGTH, None)}


def test_full_and_windowed_groups_share_a_prefix_each_its_own_part() -> None:
    engine = Engine(windows=[None, 6])
    engine.add("first", 16, max_tokens=5)
    (old,) = engine.step().chunks
    for _ in range(3):
        engine.step()
    engine.add("second", 17, max_tokens=1)
    still, new = engine.step().chunks
    assert (new.start, new.token_ids) == (16, (26,))
    assert [first for first, _ in old.block_tables] == [0, 0]
    assert [first for first, _ in still.block_tables] == [0, 3]
    assert [first for first, _ in new.block_tables] == [0, 2]
    assert new.block_tables[0][1][:4] == old.block_tables[0][1]
    assert new.block_tables[1][1][:2] == old.block_tables[1][1][2:]


def test_preemption_is_by_the_group_that_is_full() -> None:
    """Of the window's group there is enough for all."""
    engine = Engine(num_blocks=6, windows=[4, None], max_model_len=24, caching=False)
    for name in "ab":
        engine.add(name, 7, max_tokens=15)
    engine.run()
    assert engine.stats.num_preemptions == 1
    assert list(engine.ends) == [("a", 0), ("b", 0)]
    assert all(tokens == [100] * 15 for tokens in engine.tokens.values())


def test_a_sequence_that_read_the_blocks_of_one_that_gave_nan_starts_over_alone() -> None:
    engine = Engine()
    engine.add("bad", 9)
    engine.add("good", 9, max_tokens=2)
    batch = engine.step(lambda i: None)
    assert starts(batch) == [(0, 9), (8, 1)]
    assert engine.ends == {("bad", 0): (FinishReason.ERROR, None)}
    assert starts(engine.step()) == [(0, 9)]
    engine.run()
    assert engine.tokens["good", 0] == [100, 100]
    assert engine.stats.num_nan_sequences == 1


def test_a_sequence_that_gives_nan_on_its_own_blocks_too_fails() -> None:
    engine = Engine()
    engine.add("good", 9, max_tokens=5)
    engine.step()
    engine.add("bad", 9)
    engine.step(lambda i: 100 if i == 0 else None)
    assert not engine.ends
    engine.step(lambda i: 100 if i == 0 else None)
    assert engine.ends == {("bad", 0): (FinishReason.ERROR, None)}
    engine.run()
    assert engine.tokens["good", 0] == [100] * 5
