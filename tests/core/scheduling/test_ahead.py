"""A step that is scheduled before the one before it is over."""

import pytest
from fake_worker import EOS, Engine, starts

from fairlead.request import FinishReason, Request, SamplingParams, TokenLogprobs
from fairlead.scheduling.batch import SampledToken
from fairlead.scheduling.policy import Priority


def test_a_chunk_takes_the_token_that_the_step_before_samples() -> None:
    engine = Engine(ahead=True)
    engine.add("a", 3)
    engine.add("b", 5)
    first, second = engine.step(), engine.step(lambda i: 40 + i)
    assert starts(first) == [(0, 3), (0, 5)]
    assert [(c.start, c.token_ids, c.source_row, c.num_tokens) for c in second.chunks] == [(3, (), 0, 1), (5, (), 1, 1)]
    assert second.num_tokens == 2
    assert engine.tokens == {("a", 0): [40], ("b", 0): [41]}
    engine.scheduler.abort("a")
    third = engine.step()
    assert [c.source_row for c in third.chunks] == [1]


def test_a_chunk_behind_the_end_is_in_vain() -> None:
    engine = Engine(ahead=True)
    engine.add("a", 3, max_tokens=9)
    engine.step()
    engine.step(lambda i: EOS)
    assert engine.ends == {("a", 0): (FinishReason.STOP, None)}
    assert len(engine.in_flight.chunks) == 1
    assert engine.stats.kv_cache_usage == 0
    engine.run()
    assert engine.tokens == {("a", 0): [EOS]}


@pytest.mark.parametrize(("max_tokens", "max_model_len", "length"), [(1, 64, 1), (3, 64, 3), (9, 8, 5)])
def test_no_step_goes_beyond_a_known_end(max_tokens: int, max_model_len: int, length: int) -> None:
    engine = Engine(ahead=True, max_model_len=max_model_len)
    engine.add("a", 3, max_tokens=max_tokens)
    num_chunks = 0
    while engine.scheduler.has_work:
        num_chunks += len(engine.step().chunks)
    assert not engine.in_flight.chunks
    assert (num_chunks, engine.tokens) == (length, {("a", 0): [100] * length})


def test_siblings_fork_before_the_first_one_goes_on() -> None:
    engine = Engine(ahead=True)
    engine.add("a", 6, n=3, max_tokens=4)
    assert [len(engine.step().chunks) for _ in range(3)] == [1, 0, 3]
    engine.run()
    assert engine.tokens == {("a", i): [100] * 4 for i in range(3)}


def test_a_block_whose_last_token_is_not_known_is_published_later() -> None:
    engine = Engine(ahead=True)
    engine.add("a", 7, max_tokens=10)
    engine.step()
    engine.step(lambda i: 55)
    assert len(engine.scheduler.running[0].block_hashes) == 1
    engine.step()
    assert len(engine.scheduler.running[0].block_hashes) == 2
    engine.add("b", [*range(10, 17), 55, 1], max_tokens=1)
    assert starts(engine.step())[-1] == (8, 1)


def test_a_preempted_sequence_keeps_the_token_that_was_on_its_way() -> None:
    engine = Engine(ahead=True, num_blocks=4, max_model_len=16, caching=False)
    engine.add("a", 7, max_tokens=4)
    engine.add("b", 7, max_tokens=4)
    while not engine.stats.num_preemptions:
        engine.step()
    (preempted,) = engine.scheduler.waiting
    assert preempted.num_output_tokens == len(engine.tokens["b", 0]) == 2
    engine.run()
    assert engine.tokens == {(name, 0): [100] * 4 for name in "ab"}


def test_the_siblings_of_one_that_was_preempted_wait_with_it() -> None:
    engine = Engine(ahead=True, max_num_seqs=2, policy=Priority(aging_s=10))
    engine.add("a", 6, n=2, max_tokens=2, priority=1)
    engine.step()
    engine.add("urgent", 3, max_tokens=2)
    engine.step(lambda i: 70)
    assert [s.request.request_id for s in engine.scheduler.running] == ["urgent"]
    assert len(engine.scheduler.waiting) == 2
    assert engine.tokens == {("a", 0): [70]}
    engine.run()
    assert {key: len(tokens) for key, tokens in engine.tokens.items()} == {("a", 0): 2, ("a", 1): 2, ("urgent", 0): 2}


def test_tokens_on_their_way_to_one_that_starts_over_are_thrown_away() -> None:
    engine = Engine(ahead=True)
    engine.add("bad", 9)
    engine.add("good", 9, max_tokens=3)
    engine.step()
    engine.step(lambda i: None)
    assert list(engine.ends) == [("bad", 0)]
    assert len(engine.in_flight.chunks) == 2
    batch = engine.step(lambda i: 66)
    assert starts(batch) == [(0, 9)]
    assert ("good", 0) not in engine.tokens
    engine.run()
    assert engine.tokens["good", 0] == [100] * 3


def test_one_that_starts_over_after_it_was_preempted_does_so_when_its_turn_comes() -> None:
    engine = Engine(ahead=True, max_num_seqs=2, policy=Priority(aging_s=10))
    engine.add("bad", 9)
    engine.add("good", 9, max_tokens=2, priority=1)
    engine.step()
    engine.add("urgent", [50], max_tokens=1)
    engine.step(lambda i: None)
    assert [s.request.request_id for s in engine.scheduler.waiting] == ["good"]
    engine.run()
    assert engine.tokens["good", 0] == [100] * 2


def test_contexts_hold_all_tokens_before_the_sampled_ones() -> None:
    engine = Engine(ahead=True)
    engine.add("plain", 3)
    engine.add("edited", [20, 21], presence_penalty=1.0)
    engine.step()
    second = engine.step(lambda i: 60 + i)
    (row,) = contexts = engine.scheduler.sample_contexts(second)
    assert (row, contexts[row].token_ids, contexts[row].prompt, contexts[row].output) == (
        1,
        (20, 21, 61),
        (20, 21),
        (61,),
    )
    engine.scheduler.abort("edited")
    assert engine.scheduler.sample_contexts(second) == {}
    third = engine.step()
    assert not third.edits_logits
    assert engine.scheduler.sample_contexts(third) == {}


def test_a_beam_takes_one_token() -> None:
    engine = Engine(ahead=True)
    request = Request(request_id="a", prompt_token_ids=(1, 2), params=SamplingParams(), num_beam_candidates=2)
    engine.scheduler.add(request, seed=0, output_token_ids=(3,))
    assert [len(engine.step().chunks) for _ in range(2)] == [1, 0]
    assert engine.ends == {("a", 0): (FinishReason.LENGTH, None)}


def test_an_error_of_the_sampler_ends_a_sequence() -> None:
    engine = Engine()
    engine.add("a", 3)
    (delta,) = engine.scheduler.update(engine.scheduler.schedule(), [SampledToken(token_id=None, error="no")])
    assert (delta.error, delta.finish_reason) == ("no", FinishReason.ERROR)


def test_a_sequence_that_no_step_can_take_is_asked_for_by_its_id() -> None:
    engine = Engine()
    engine.add("a", 3)
    assert engine.scheduler.has_request("a")
    sequence = engine.scheduler.find_sequence(0)
    assert sequence is not None
    assert sequence.request.request_id == "a"
    engine.scheduler.abort("a")
    assert engine.scheduler.find_sequence(0) is None
    assert not engine.scheduler.has_request("a")


def test_a_token_that_completes_a_grammar_ends_its_sequence() -> None:
    engine = Engine()
    engine.add("a", 3)
    (delta,) = engine.scheduler.update(engine.scheduler.schedule(), [SampledToken(token_id=7, ends_sequence=True)])
    assert (delta.token_ids, delta.finish_reason, delta.stop_reason) == ((7,), FinishReason.STOP, None)


def test_prompt_logprobs_are_gathered_chunk_by_chunk_though_the_next_is_scheduled() -> None:
    engine = Engine(budget=4)
    engine.add("a", 10, prompt_logprobs=1, max_tokens=1)
    row = [TokenLogprobs(token_ids=(i,), logprobs=(0.0,), rank=1) for i in range(9)]
    first, second = engine.scheduler.schedule(), engine.scheduler.schedule()
    assert engine.scheduler.update(first, [], {0: row[:4]}) == []
    third = engine.scheduler.schedule()
    assert [c.extras and c.extras.prompt_targets for b in (first, second, third) for c in b.chunks] == [
        (11, 12, 13, 14),
        (15, 16, 17, 18),
        (19,),
    ]
    engine.scheduler.update(second, [], {0: row[4:8]})
    (delta,) = engine.scheduler.update(third, [SampledToken(token_id=1)], {0: row[8:]})
    assert delta.prompt_logprobs == tuple(row)
