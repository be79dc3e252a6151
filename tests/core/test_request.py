"""Sampling parameters and requests: every range, and what the checks name."""

import dataclasses
import math
from typing import Any

import pytest

from fairlead.errors import ContextLengthError, RequestError
from fairlead.request import CompletionOutput, Request, SamplingParams, Sequence

IN_RANGE: list[dict[str, Any]] = [
    {"n": 1},
    {"n": 128},
    {"temperature": 0},
    {"temperature": 0.0},
    {"temperature": 5.0},
    {"top_k": -1},
    {"top_k": 0},
    {"top_k": 10**6},
    {"top_p": 1},
    {"top_p": 1e-9},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"seed": None},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"stop": ("x",) * 64},
    {"stop": ("x" * 4096,)},
    {"stop_token_ids": (0, 5)},
    {"stop_token_ids": tuple(range(1024))},
    {"max_tokens": None},
    {"max_tokens": 1},
    {"presence_penalty": -2},
    {"presence_penalty": 2.0},
    {"frequency_penalty": 2},
    {"repetition_penalty": 1e-9},
    {"repetition_penalty": 5},
    {"min_tokens": 16},
    {"logit_bias": None},
    {"logit_bias": {0: -100, 5: 100.0}},
    {"allowed_token_ids": None},
    {"allowed_token_ids": (0, 7)},
    {"bad_words": ("a", " b")},
    {"logits_processors": ("name", print)},
    {"logprobs": None},
    {"logprobs": 0},
    {"logprobs": 20},
    {"prompt_logprobs": 0},
    {"best_of": 1},
    {"best_of": 128},
    {"truncate_prompt_tokens": -1},
    {"truncate_prompt_tokens": 1},
    {"spaces_between_special_tokens": False},
    {"prompt_logprobs": 20},
]
OUT_OF_RANGE: list[dict[str, Any]] = [
    {"n": 0},
    {"n": 129},
    {"n": 1.0},
    {"n": True},
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": "hot"},
    {"temperature": True},
    {"temperature": None},
    {"top_k": -2},
    {"top_k": 1.5},
    {"top_p": 0},
    {"top_p": 1.1},
    {"top_p": -0.5},
    {"top_p": math.nan},
    {"min_p": -0.1},
    {"min_p": 1.5},
    {"seed": 2**63},
    {"seed": -(2**63) - 1},
    {"seed": 1.0},
    {"stop": ("x",) * 65},
    {"stop": ("",)},
    {"stop": (1,)},
    {"stop_token_ids": (-1,)},
    {"stop_token_ids": ("a",)},
    {"presence_penalty": 2.01},
    {"presence_penalty": -2.01},
    {"presence_penalty": math.nan},
    {"frequency_penalty": -2.01},
    {"frequency_penalty": "1"},
    {"frequency_penalty": True},
    {"repetition_penalty": 0},
    {"repetition_penalty": -1.0},
    {"repetition_penalty": math.inf},
    {"repetition_penalty": 10**400},
    {"temperature": 10**400},
    {"min_tokens": -1},
    {"min_tokens": 17},
    {"min_tokens": 2**63},
    {"min_tokens": 1.0},
    {"logit_bias": {-1: 1}},
    {"logit_bias": {2**31: 1}},
    {"logit_bias": {"x": 1}},
    {"logit_bias": {True: 1}},
    {"logit_bias": {1: 101}},
    {"logit_bias": {1: -100.5}},
    {"logit_bias": {1: math.nan}},
    {"logit_bias": {1: "1"}},
    {"logit_bias": {1: None}},
    {"logit_bias": dict.fromkeys(range(1025), 1)},
    {"logit_bias": [1]},
    {"allowed_token_ids": ()},
    {"allowed_token_ids": (-1,)},
    {"allowed_token_ids": (1.0,)},
    {"allowed_token_ids": "12"},
    {"bad_words": ("",)},
    {"bad_words": ("x" * 257,)},
    {"stop": ("y", "x" * 4097)},
    {"stop_token_ids": (7,) * 1025},
    {"bad_words": (3,)},
    {"bad_words": "word"},
    {"bad_words": ("x",) * 1025},
    {"logits_processors": (3,)},
    {"logits_processors": ("",)},
    {"logits_processors": "name"},
    {"max_tokens": 0},
    {"max_tokens": -5},
    {"max_tokens": 1.5},
    {"logprobs": -1},
    {"logprobs": 21},
    {"logprobs": True},
    {"prompt_logprobs": -1},
    {"use_beam_search": 1},
    {"length_penalty": 0.5},
    {"early_stopping": True},
    {"early_stopping": "always"},
    {"early_stopping": None},
    {"best_of": 0},
    {"best_of": 129},
    {"best_of": True},
    {"truncate_prompt_tokens": 0},
    {"truncate_prompt_tokens": -2},
    {"truncate_prompt_tokens": 1.5},
    {"truncate_prompt_tokens": 2**63},
    {"prompt_logprobs": 21},
]


@pytest.mark.parametrize("arguments", IN_RANGE, ids=lambda a: str(a)[:40])
def test_a_value_in_range_is_kept(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    assert getattr(SamplingParams(**arguments), name) == arguments[name]


@pytest.mark.parametrize("arguments", OUT_OF_RANGE, ids=lambda a: str(a)[:40])
def test_a_value_out_of_range_is_named(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**arguments)
    assert caught.value.param == name
    assert isinstance(caught.value, ValueError)


def test_an_absurd_value_makes_no_absurd_message() -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(temperature="x" * 100_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 300


def test_one_stop_string_and_lists_become_tuples() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1]).stop == ("a", "b")  # type: ignore[arg-type]
    assert SamplingParams(stop=None, stop_token_ids=None).stop_token_ids == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"stop": "x"}, "stop"),
        ({"stop_token_ids": list(range(17))}, "stop_token_ids"),
        ({"length_penalty": math.nan}, "length_penalty"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"early_stopping": "sometimes"}, "early_stopping"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"best_of": 2, "n": 3}, "best_of"),
    ],
    ids=str,
)
def test_beams_have_rules_of_their_own(settings: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError, match=param) as caught:
        SamplingParams(**{"use_beam_search": True, "temperature": 0, **settings})
    assert caught.value.param == param


def test_the_widths_of_a_beam_search() -> None:
    params = SamplingParams(
        use_beam_search=True, temperature=0, n=2, best_of=5, length_penalty=-1, early_stopping="never"
    )
    assert (params.beam_width, params.num_sequences, params.is_ranked) == (5, 2, True)
    assert SamplingParams(use_beam_search=True, temperature=0, n=3).beam_width == 3


def test_best_of_is_at_least_n() -> None:
    assert SamplingParams(n=3, best_of=3).num_sequences == SamplingParams(n=3).num_sequences == 3
    assert not SamplingParams(n=3, best_of=3).is_ranked
    assert SamplingParams(n=3, best_of=4).is_ranked
    with pytest.raises(RequestError, match="from n=3 to 128"):
        SamplingParams(n=3, best_of=2)


def test_json_spells_the_ids_of_a_bias_as_text() -> None:
    assert SamplingParams(logit_bias={"5": 1, 6: 2.0}).logit_bias == {5: 1, 6: 2.0}  # type: ignore[dict-item]
    assert SamplingParams(logit_bias={}).logit_bias is None
    assert SamplingParams(allowed_token_ids=[4, 4, 2]).allowed_token_ids == (4, 2)  # type: ignore[arg-type]


def test_only_what_differs_from_the_default_edits_logits() -> None:
    assert not SamplingParams(temperature=0.3, top_k=3, top_p=0.2, min_p=0.1, stop="x", seed=3).edits_logits
    for settings in (
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"min_tokens": 1},
        {"logit_bias": {1: 0.0}},
        {"allowed_token_ids": [1]},
        {"bad_words": ["x"]},
        {"logits_processors": ["x"]},
    ):
        assert SamplingParams(**settings).edits_logits


@pytest.mark.parametrize("settings", [{"allowed_token_ids": [5, 100]}, {"logit_bias": {5: 1, 100: 1}}], ids=str)
def test_token_ids_are_checked_against_the_vocabulary(settings: dict[str, Any]) -> None:
    request = Request(request_id="r", prompt_token_ids=(1,), params=SamplingParams(**settings))
    request.check(max_model_len=8, vocab_size=101, max_num_seqs=2)
    with pytest.raises(RequestError, match=r"token id 100 is outside the vocabulary \(0 to 99\)") as caught:
        request.check(max_model_len=8, vocab_size=100, max_num_seqs=2)
    assert caught.value.param == next(iter(settings))


def test_stop_strings_need_text() -> None:
    with pytest.raises(RequestError, match="stop_token_ids") as caught:
        SamplingParams(stop=("x",), detokenize=False)
    assert caught.value.param == "stop"


def test_greedy_is_temperature_zero() -> None:
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-9).is_greedy


def test_parameters_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]


def check(prompt: tuple[int, ...], n: int = 1) -> None:
    request = Request(request_id="r", prompt_token_ids=prompt, params=SamplingParams(n=n))
    request.check(max_model_len=8, vocab_size=100, max_num_seqs=2)


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    check((0,) * 7)
    check((99,), n=2)
    with pytest.raises(ContextLengthError, match=r"maximum context length is 8 tokens.*8 tokens") as caught:
        check((0,) * 8)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "n", "message", "param"),
    [
        ((), 1, "the prompt is empty", "prompt"),
        ((5, -1), 1, r"token id -1 is outside the vocabulary \(0 to 99\)", "prompt"),
        ((5, 100), 1, "token id 100 is outside", "prompt"),
        ((5,), 3, "n=3 exceeds max_num_seqs=2", "n"),
    ],
)
def test_a_request_that_can_never_run_is_refused(prompt: tuple[int, ...], n: int, message: str, param: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check(prompt, n)
    assert caught.value.param == param


def test_a_sequence_counts_its_tokens() -> None:
    request = Request(request_id="r", prompt_token_ids=(1, 2, 3))
    sequence = Sequence(
        seq_id=0, key=(0.0, 0), max_num_tokens=100, request=request, index=0, seed=0, token_ids=[1, 2, 3, 7, 8]
    )
    assert (sequence.num_tokens, sequence.num_prompt_tokens, sequence.num_output_tokens) == (5, 3, 2)


def test_an_output_is_finished_once_it_has_a_reason() -> None:
    assert not CompletionOutput(index=0, text="", token_ids=[]).finished
    assert CompletionOutput(index=0, text="", token_ids=[], finish_reason="stop").finished
