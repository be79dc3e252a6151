"""Streamed text equals the text decoded at once, whatever the tokens, their chunks and the stop strings."""

import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairlead.request import SamplingParams
from fairlead.tokenization.detokenizer import Detokenizer
from fairlead.tokenization.tokenizer import Tokenizer

TEXTS = [
    "hello world",
    " he said:",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "e\u0301a\u0308",
    "ภาษาไทย",
    "ends in 🙂",
    "a  b\n\nc",
]
FIXTURES = [HealthCheck.function_scoped_fixture]


def whole(tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], *, skip: bool = True) -> str:
    """The definition: what decoding at once adds to decoding the prompt."""
    before = tokenizer.decode([*prompt], skip_special_tokens=skip)
    text = tokenizer.decode([*prompt, *output], skip_special_tokens=skip)
    common = 0
    while common < min(len(before), len(text)) and before[common] == text[common]:
        common += 1
    return text[common:]


def streamed(
    tokenizer: Tokenizer, prompt: Sequence[int], output: Sequence[int], params: SamplingParams, *, chunk: int = 1
) -> tuple[str, Detokenizer]:
    detokenizer = Detokenizer(tokenizer, prompt, params)
    released = ""
    for i in range(0, len(output), chunk):
        released += detokenizer.push(output[i : i + chunk])
        assert detokenizer.text == released
    released += detokenizer.finish()
    assert detokenizer.text == released
    return released, detokenizer


def any_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Token ids with many special and byte tokens among them, and some beyond the vocabulary."""
    low = st.integers(0, min(300, tokenizer.vocab_size - 1))
    return st.lists(st.integers(0, tokenizer.vocab_size + 2) | low, max_size=24)


@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=100, deadline=None, suppress_health_check=FIXTURES)
@given(data=st.data())
def test_random_tokens_stream_to_the_whole_text(tokenizer: Tokenizer, skip: bool, data: st.DataObject) -> None:
    ids = any_ids(tokenizer)
    prompt, output, chunk = data.draw(ids), data.draw(ids), data.draw(st.integers(1, 5))
    if tokenizer.has_byte_fallback:  # a run that spans the border is defined apart; see below
        prompt = [i for i in prompt if i < tokenizer.vocab_size and i not in tokenizer.special_token_ids]
        while prompt and tokenizer.is_byte_token(prompt[-1]):
            prompt.pop()
    params = SamplingParams(skip_special_tokens=skip)
    assert streamed(tokenizer, prompt, output, params, chunk=chunk)[0] == whole(tokenizer, prompt, output, skip=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_text_split_anywhere_streams_to_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    for border in range(len(ids) + 1):
        for chunk in (1, 2, 100):
            released, _ = streamed(tokenizer, ids[:border], ids[border:], SamplingParams(), chunk=chunk)
            if border and tokenizer.is_byte_token(ids[border - 1]):  # the prompt keeps the characters it completed
                completed = b"".join(map(tokenizer.token_bytes, ids[:border])).decode("utf-8", "ignore")
                assert completed.removeprefix(" ") + released == text.removeprefix(" ")
            else:
                assert released == whole(tokenizer, ids[:border], ids[border:])


@pytest.mark.parametrize("name", ["demo", "sentencepiece", "llama-spm"])
@settings(max_examples=50, deadline=None, suppress_health_check=FIXTURES)
@given(text=st.text(max_size=30), chunk=st.integers(1, 4))
def test_any_text_round_trips(tokenizer_named: Callable[[str], Tokenizer], name: str, text: str, chunk: int) -> None:
    tokenizer = tokenizer_named(name)
    prompt = tokenizer.encode("a", add_special_tokens=False)
    ids = tokenizer.encode_continuation(text)
    assert streamed(tokenizer, prompt, ids, SamplingParams(skip_special_tokens=False), chunk=chunk)[0] == text


def bytes_of(tokenizer: Tokenizer, data: bytes) -> list[int]:
    found = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in data]
    assert None not in found
    return found


def test_the_space_after_the_prompt_is_kept(spm_tokenizer: Tokenizer) -> None:
    prompt = spm_tokenizer.encode("he")
    ids = spm_tokenizer.encode("he", add_special_tokens=False)
    assert streamed(spm_tokenizer, prompt, ids, SamplingParams())[0] == " he"
    assert streamed(spm_tokenizer, [1], ids, SamplingParams())[0] == "he"


def test_the_space_after_a_skipped_special_token_is_kept(spm_tokenizer: Tokenizer) -> None:
    ids = spm_tokenizer.encode("he", add_special_tokens=False)
    assert streamed(spm_tokenizer, [], [*ids, 2, *ids], SamplingParams())[0] == "he he"


def test_a_byte_run_is_text_or_replaced_as_a_whole(spm_tokenizer: Tokenizer) -> None:
    a = spm_tokenizer.backend.token_to_id("a")
    for data, expected in ((b"\xc3\xa9", "aéa"), (b"\xc3\xa9\xff", "a\ufffd\ufffd\ufffda"), (b"\xc3", "a\ufffda")):
        ids = [a, *bytes_of(spm_tokenizer, data), a]
        assert streamed(spm_tokenizer, [a], ids, SamplingParams())[0] == expected == whole(spm_tokenizer, [a], ids)


def test_an_incomplete_tail_comes_out_at_the_end(spm_tokenizer: Tokenizer, demo_tokenizer: Tokenizer) -> None:
    a = spm_tokenizer.backend.token_to_id("a")
    detokenizer = Detokenizer(spm_tokenizer, [a], SamplingParams())
    assert detokenizer.push([a, *bytes_of(spm_tokenizer, b"\xf0\x9f")]) == "a"
    assert detokenizer.finish() == "\ufffd\ufffd"
    ids = demo_tokenizer.encode("🙂", add_special_tokens=False)
    detokenizer = Detokenizer(demo_tokenizer, [], SamplingParams())
    assert detokenizer.push(ids[:-1]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_character_across_the_border_is_the_outputs(spm_tokenizer: Tokenizer, demo_tokenizer: Tokenizer) -> None:
    a = spm_tokenizer.backend.token_to_id("a")
    for tokenizer, ids in (
        (spm_tokenizer, [a, *bytes_of(spm_tokenizer, "🙂".encode())]),
        (demo_tokenizer, demo_tokenizer.encode("a🙂", add_special_tokens=False)),
    ):
        assert streamed(tokenizer, ids[:-2], ids[-2:], SamplingParams())[0] == "🙂"
        other = tokenizer.encode_continuation("a")
        assert streamed(tokenizer, ids[:-2], other, SamplingParams())[0] == "a"


@pytest.mark.parametrize("data", [b"\xed\xa1", b"\xed", b"\xf0\x9f\x99", b"a\xed\xbf", b"\xf4\x90", b"\xc3"])
def test_what_the_prompt_left_incomplete_is_not_the_outputs(demo_tokenizer: Tokenizer, data: bytes) -> None:
    token_of = {demo_tokenizer.token_bytes(i): i for i in range(demo_tokenizer.vocab_size)}
    prompt = [token_of[bytes([byte])] for byte in data]
    for output in (b"", b"\x80", b"\xff", b"a", b"\x82\xac", b"\xe2\x82"):
        ids = [token_of[bytes([byte])] for byte in output]
        text = streamed(demo_tokenizer, prompt, ids, SamplingParams())[0]
        assert text == whole(demo_tokenizer, prompt, ids)


def test_a_byte_run_in_the_prompt_keeps_its_characters(spm_tokenizer: Tokenizer) -> None:
    prompt = bytes_of(spm_tokenizer, "é".encode())
    he = spm_tokenizer.encode("he", add_special_tokens=False)
    assert streamed(spm_tokenizer, prompt, he, SamplingParams())[0] == " he"
    assert streamed(spm_tokenizer, prompt, bytes_of(spm_tokenizer, "ü".encode()), SamplingParams())[0] == "ü"
    assert streamed(spm_tokenizer, prompt, bytes_of(spm_tokenizer, b"\xff"), SamplingParams())[0] == "\ufffd"


@pytest.mark.parametrize("name", ["demo", "sentencepiece"])
def test_invalid_runs_take_linear_time(tokenizer_named: Callable[[str], Tokenizer], name: str) -> None:
    tokenizer = tokenizer_named(name)
    bad = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xff")
    start = time.perf_counter()
    text, _ = streamed(tokenizer, [], [bad] * 50_000, SamplingParams(), chunk=100)
    assert text == "\ufffd" * 50_000
    assert time.perf_counter() - start < 5.0  # DecodeStream needs minutes


def naive_stop(pieces: list[str], stops: Sequence[str], include: bool) -> tuple[str, int, str | None]:
    text = ""
    for i, piece in enumerate(pieces):
        text += piece
        found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
        if found:
            start, size, stop = min(found)
            return text[: start + size if include else start], min(i + 1, len(pieces) - 1), stop
    return text, len(pieces) - 1, None


@settings(max_examples=300, deadline=None, suppress_health_check=FIXTURES)
@given(
    text=st.text("abcé🙂 ", max_size=40),
    stops=st.lists(st.text("abcé🙂 ", min_size=1, max_size=5), min_size=1, max_size=4),
    include=st.booleans(),
    chunk=st.integers(1, 6),
    name=st.sampled_from(["demo", "sentencepiece"]),
)
def test_stop_strings_cut_where_a_naive_search_does(
    tokenizer_named: Callable[[str], Tokenizer], text: str, stops: list[str], include: bool, chunk: int, name: str
) -> None:
    tokenizer = tokenizer_named(name)
    prompt, ids = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode_continuation(text)
    plain = Detokenizer(tokenizer, prompt, SamplingParams())
    pieces = [plain.push([i]) for i in ids] + [plain.finish()]
    params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=include)
    released, detokenizer = streamed(tokenizer, prompt, ids, params, chunk=chunk)
    assert (released, detokenizer.num_tokens, detokenizer.stop) == naive_stop(pieces, stops, include)


def test_only_what_may_become_a_stop_string_is_held_back(demo_tokenizer: Tokenizer) -> None:
    ids = [demo_tokenizer.encode(char, add_special_tokens=False)[0] for char in "xabaqabac"]
    detokenizer = Detokenizer(demo_tokenizer, [], SamplingParams(stop=("abac",)))
    assert [detokenizer.push([i]) for i in ids] == ["x", "", "", "", "abaq", "", "", "", ""]
    assert (detokenizer.text, detokenizer.stop, detokenizer.num_tokens) == ("xabaq", "abac", 9)
    assert detokenizer.push(ids) == detokenizer.finish() == ""


def test_a_stop_string_of_self_overlaps_takes_linear_time(demo_tokenizer: Tokenizer) -> None:
    a = demo_tokenizer.encode("a", add_special_tokens=False)[0]
    params = SamplingParams(stop=("a" * 4_000 + "b",))
    start = time.perf_counter()
    text, detokenizer = streamed(demo_tokenizer, [], [a] * 20_000, params, chunk=100)
    assert (text, detokenizer.stop) == ("a" * 20_000, None)
    assert time.perf_counter() - start < 5.0


def test_a_stop_string_in_a_byte_run_ends_at_the_finish(spm_tokenizer: Tokenizer) -> None:
    a = spm_tokenizer.backend.token_to_id("a")
    detokenizer = Detokenizer(spm_tokenizer, [a], SamplingParams(stop=("é",)))
    assert detokenizer.push([a, *bytes_of(spm_tokenizer, "éü".encode())]) == "a"
    assert detokenizer.finish() == ""
    assert (detokenizer.text, detokenizer.stop, detokenizer.num_tokens) == ("a", "é", 5)
