"""Deltas in, request outputs out."""

from typing import Any

import pytest

from fairlead import demo
from fairlead.engine.output_processor import OutputProcessor, ProcessedOutputs
from fairlead.errors import RequestError
from fairlead.request import FinishReason, Request, RequestOutput, SamplingParams, SequenceDelta, TokenLogprobs
from fairlead.tokenization.tokenizer import Tokenizer, load_tokenizer

END = 3  # the demo's end-of-sequence token


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(demo.path())


@pytest.fixture
def processor(tokenizer: Tokenizer) -> OutputProcessor:
    return OutputProcessor(tokenizer)


def add(processor: OutputProcessor, request_id: str = "r", prompt: tuple[int, ...] = (1, 2), **params: Any) -> None:
    request = Request(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(**params))
    processor.add(request, "the prompt")


def step(processor: OutputProcessor, *ids: int, index: int = 0, request_id: str = "r", **rest: Any) -> ProcessedOutputs:
    return processor.process([SequenceDelta(request_id=request_id, index=index, token_ids=ids, **rest)])


def only(processed: ProcessedOutputs) -> RequestOutput:
    (output,) = processed.outputs
    return output


def letters(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.encode(char, add_special_tokens=False)[0] for char in text]


def test_outputs_are_cumulative_and_independent(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    a, b, c = letters(tokenizer, "abc")
    add(processor)
    first = only(step(processor, a, num_cached_tokens=1))
    second = only(step(processor, b, c, finish_reason=FinishReason.LENGTH))
    assert (first.outputs[0].text, first.outputs[0].token_ids, first.finished) == ("a", [a], False)
    assert first.outputs[0].finish_reason is None
    assert (second.outputs[0].text, second.outputs[0].token_ids, second.finished) == ("abc", [a, b, c], True)
    assert second.outputs[0].finish_reason == "length"
    assert (second.prompt, tuple(second.prompt_token_ids), second.num_cached_tokens) == ("the prompt", (1, 2), 1)
    assert processor.num_requests == 0


def test_several_deltas_of_a_request_make_one_output(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    a, b = letters(tokenizer, "ab")
    add(processor, n=2)
    deltas = [SequenceDelta(request_id="r", index=i, token_ids=(t,)) for i, t in ((1, b), (0, a), (1, b))]
    output = only(processor.process(deltas))
    assert [(o.index, o.text) for o in output.outputs] == [(0, "a"), (1, "bb")]
    output = only(step(processor, END, index=0, finish_reason=FinishReason.STOP))
    assert not output.finished
    assert [o.finished for o in output.outputs] == [True, False]
    assert only(step(processor, a, index=1, finish_reason=FinishReason.LENGTH)).finished
    assert processor.num_requests == 0


def test_only_finished_leaves_the_others_out(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    (a,) = letters(tokenizer, "a")
    add(processor, "r")
    add(processor, "s")
    deltas = [
        SequenceDelta(request_id="r", index=0, token_ids=(a,)),
        SequenceDelta(request_id="s", index=0, token_ids=(a,), finish_reason=FinishReason.LENGTH),
    ]
    assert [o.request_id for o in processor.process(deltas, only_finished=True).outputs] == ["s"]
    assert only(step(processor, a, finish_reason=FinishReason.LENGTH)).outputs[0].text == "aa"


@pytest.mark.parametrize(
    ("params", "ids", "stop_reason", "text"),
    [
        ({}, "ab", None, "ab"),
        ({"skip_special_tokens": False}, "ab", None, "ab"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "ab", None, "ab<|end|>"),
        ({"include_stop_str_in_output": True}, "ab", None, "ab"),
    ],
)
def test_the_end_token_is_a_token_but_no_text(
    processor: OutputProcessor, tokenizer: Tokenizer, params: dict[str, Any], ids: str, stop_reason: None, text: str
) -> None:
    add(processor, **params)
    tokens = [*letters(tokenizer, ids), END]
    output = only(step(processor, *tokens, finish_reason=FinishReason.STOP, stop_reason=stop_reason)).outputs[0]
    assert (output.text, output.token_ids, output.finish_reason, output.stop_reason) == (text, tokens, "stop", None)


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "ab")])
def test_an_ordinary_stop_token_is_text_only_on_request(
    processor: OutputProcessor, tokenizer: Tokenizer, include: bool, text: str
) -> None:
    a, b = letters(tokenizer, "ab")
    add(processor, stop_token_ids=(b,), include_stop_str_in_output=include)
    output = only(step(processor, a, b, finish_reason=FinishReason.STOP, stop_reason=b)).outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == (text, [a, b], b)


def logprobs_of(*tokens: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token_ids=(t,), logprobs=(-1.0,), rank=1) for t in tokens)


@pytest.mark.parametrize(("include", "text"), [(False, "x"), (True, "xab")])
def test_a_stop_string_ends_the_sequence_here(
    processor: OutputProcessor, tokenizer: Tokenizer, include: bool, text: str
) -> None:
    x, a, b, c = tokens = letters(tokenizer, "xabc")
    add(processor, stop="ab", logprobs=0, include_stop_str_in_output=include)
    first = step(processor, x, a, logprobs=logprobs_of(x, a))
    assert (only(first).outputs[0].text, first.finish) == ("x", [])
    last = step(processor, b, c, logprobs=logprobs_of(b, c))
    output = only(last).outputs[0]
    assert (output.text, output.token_ids, output.finish_reason, output.stop_reason) == (text, tokens[:3], "stop", "ab")
    assert output.logprobs is not None
    assert (len(output.logprobs), output.cumulative_logprob) == (3, -3.0)
    assert last.finish == [("r", 0)]
    assert only(last).finished
    assert step(processor, c) == ProcessedOutputs(outputs=[], finish=[])  # what the engine was ahead


def test_overshoot_of_an_ended_sequence_is_passed_over(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    a, b = letters(tokenizer, "ab")
    add(processor, stop="a", n=2)
    assert step(processor, a, index=1).finish == [("r", 1)]
    assert step(processor, b, index=1, finish_reason=FinishReason.LENGTH).outputs == []
    output = only(step(processor, b, finish_reason=FinishReason.LENGTH))
    assert [(o.text, o.finish_reason) for o in output.outputs] == [("b", "length"), ("", "stop")]


def test_a_stop_string_at_the_engines_own_end_needs_no_finish(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    a, b = letters(tokenizer, "ab")
    add(processor, stop="ab")
    last = step(processor, a, b, finish_reason=FinishReason.LENGTH)
    assert last.finish == []
    assert (only(last).outputs[0].finish_reason, only(last).outputs[0].stop_reason) == ("stop", "ab")


def test_held_text_comes_out_at_the_end(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    a, *_ = letters(tokenizer, "a")
    add(processor, stop="ab")
    assert only(step(processor, a)).outputs[0].text == ""
    assert only(step(processor, END, finish_reason=FinishReason.STOP)).outputs[0].text == "a"


def test_logprobs_have_the_sampled_token_first_and_no_duplicates(
    processor: OutputProcessor, tokenizer: Tokenizer
) -> None:
    a, b, c = letters(tokenizer, "abc")
    add(processor, logprobs=2)
    found = (
        TokenLogprobs(token_ids=(c, a, b), logprobs=(-5.0, -0.1, -2.0), rank=7),
        TokenLogprobs(token_ids=(b, a, b), logprobs=(-0.5, -0.25, -0.5), rank=2),
    )
    output = only(step(processor, c, b, logprobs=found)).outputs[0]
    assert output.logprobs is not None
    shown = [[(t, e.logprob, e.rank, e.decoded_token) for t, e in best.items()] for best in output.logprobs]
    assert shown == [
        [(c, -5.0, 7, "c"), (a, -0.1, 1, "a"), (b, -2.0, 2, "b")],
        [(b, -0.5, 2, "b"), (a, -0.25, 1, "a")],
    ]
    assert output.cumulative_logprob == -5.5


def test_without_logprobs_there_is_no_cumulative_one(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    add(processor)
    output = only(step(processor, *letters(tokenizer, "a"))).outputs[0]
    assert (output.logprobs, output.cumulative_logprob) == (None, None)


def test_abort_ends_the_open_sequences(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    a, *_ = letters(tokenizer, "a")
    add(processor, n=2, stop="ab")
    step(processor, a, finish_reason=FinishReason.LENGTH)
    step(processor, a, index=1)
    output = processor.abort("r")
    assert output is not None
    assert output.finished
    assert [(o.text, o.finish_reason) for o in output.outputs] == [("a", "length"), ("a", "abort")]
    assert processor.abort("r") is None
    assert step(processor, a).outputs == []


def test_a_dead_engine_ends_every_request(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    add(processor, "r")
    add(processor, "s")
    step(processor, *letters(tokenizer, "a"))
    outputs = processor.fail_all("the engine died")
    assert [(o.request_id, o.outputs[0].text, o.outputs[0].finish_reason) for o in outputs] == [
        ("r", "a", "error"),
        ("s", "", "error"),
    ]
    assert all(o.finished and o.error == "the engine died" for o in outputs)
    assert (processor.num_requests, processor.fail_all("again")) == (0, [])


def test_a_failed_sequence_carries_its_error(processor: OutputProcessor, tokenizer: Tokenizer) -> None:
    add(processor, n=2)
    output = only(step(processor, index=1, finish_reason=FinishReason.ERROR, error="NaN"))
    assert (output.error, output.finished, output.outputs[1].finish_reason) == ("NaN", False, "error")
    output = only(step(processor, *letters(tokenizer, "a"), finish_reason=FinishReason.LENGTH))
    assert (output.error, output.finished, output.outputs[0].text) == ("NaN", True, "a")


def test_without_detokenization_there_is_no_text(tokenizer: Tokenizer) -> None:
    for processor, params in ((OutputProcessor(tokenizer), {"detokenize": False}), (OutputProcessor(None), {})):
        add(processor, logprobs=0, **params)
        output = only(step(processor, 65, 3, logprobs=logprobs_of(65, 3), finish_reason=FinishReason.STOP)).outputs[0]
        assert (output.text, output.token_ids, output.finish_reason) == ("", [65, 3], "stop")
        assert output.logprobs is not None
        has_text = output.logprobs[0][65].decoded_token is not None
        assert has_text is bool(params)


def test_stop_strings_without_a_tokenizer_are_refused() -> None:
    with pytest.raises(RequestError, match="need a tokenizer"):
        add(OutputProcessor(None), stop="a")
