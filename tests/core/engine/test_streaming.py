"""N16: a streamed answer is the whole one, to the byte: split characters, invalid bytes and stop strings too.

A logits processor dictates the tokens, so that answers hold what a model would seldom write.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fairlead import LLM, RequestOutput, SamplingParams

TEXTS = {
    "emoji": "a 🙂 and 👩‍👩‍👧‍👦, 🏳️‍🌈!",
    "cjk": "日本語のテキスト、漢字。",
    "combining": "e\u0301a\u0308 n\u0303o\u0302 ก็ภาษาไทย",
    "plain": "But soft! what light through yonder window breaks?",
    "blank": "a  b\n\n\tc \u00a0\u200b d",
}
BYTES = {"cut": "é🙂".encode()[:-1], "invalid": b"a\xff\xfeb\xf0\x9fc", "halves": b"\xe6\x97x\xa5\xe6\x97\xa5"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("demo", dtype="float32", max_num_seqs=16, max_model_len=128)
    yield llm
    llm.engine.scheduler.check_integrity()
    assert llm.engine.stats().kv_cache_usage == 0
    llm.close()


def token_ids(llm: LLM, name: str) -> list[int]:
    """Byte by byte where the text is cut by force, as the tokenizer would write it else."""
    tokenizer = llm.get_tokenizer()
    if name in TEXTS:
        return tokenizer.encode_continuation(TEXTS[name])
    by_byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [by_byte[bytes([byte])] for byte in BYTES[name]]


def dictate(ids: list[int], **params: Any) -> SamplingParams:
    """Samples these tokens and nothing else."""

    def processor(logits_V: torch.Tensor, prompt: tuple[int, ...], output: tuple[int, ...]) -> torch.Tensor:
        return torch.full_like(logits_V, -torch.inf).index_fill_(0, torch.tensor(ids[len(output)]), 0.0)

    defaults: dict[str, Any] = {"max_tokens": len(ids), "ignore_eos": True, "temperature": 0}
    return SamplingParams(logits_processors=(processor,), **{**defaults, **params})


def check_stream(seen: list[RequestOutput], whole: RequestOutput) -> None:
    """Each output continues the one before, and the last one is the whole."""
    for a, b in itertools.pairwise(seen):
        for old, new in zip(a.outputs, b.outputs, strict=True):
            assert new.text.startswith(old.text)
            assert list(new.token_ids[: len(old.token_ids)]) == list(old.token_ids)
    assert [output.finished for output in seen] == [False] * (len(seen) - 1) + [True]
    for last, one in zip(seen[-1].outputs, whole.outputs, strict=True):
        assert last.text.encode() == one.text.encode()
        found, expected = ((o.token_ids, o.finish_reason, o.stop_reason, o.logprobs) for o in (last, one))
        assert found == expected


@pytest.mark.parametrize("name", [*TEXTS, *BYTES])
def test_n16_streamed_or_whole(llm: LLM, name: str) -> None:
    ids = token_ids(llm, name)
    params = dictate(ids, logprobs=1, skip_special_tokens=False)
    (whole,) = llm.generate("A", params, use_tqdm=False)
    expected = TEXTS.get(name) or BYTES[name].decode("utf-8", "replace")
    assert (list(whole.outputs[0].token_ids), whole.outputs[0].text) == (ids, expected)
    check_stream(list(llm.generate_stream("A", params)), whole)


@pytest.mark.parametrize("name", TEXTS)
def test_n16_streamed_or_whole_up_to_a_stop_string(llm: LLM, name: str, count: Callable[..., int]) -> None:
    """Stop strings of every place and of 1 to 5 characters: within tokens, over their borders, over those of bytes."""
    text, ids = TEXTS[name], token_ids(llm, name)
    tried: set[str] = set()
    step = count(5, full=1)
    for start, size in itertools.product(range(0, len(text), step), range(1, 6, count(2, full=1))):
        stop = text[start : start + size]
        if stop in tried:
            continue
        tried.add(stop)
        include = len(tried) % 2 == 0
        params = dictate(ids, stop=[stop, "never"], include_stop_str_in_output=include)
        (whole,) = llm.generate("A", params, use_tqdm=False)
        end = text.index(stop) + (len(stop) if include else 0)
        assert whole.outputs[0].text == text[:end]
        assert (whole.outputs[0].finish_reason, whole.outputs[0].stop_reason) == ("stop", stop)
        check_stream(list(llm.generate_stream("A", params)), whole)


def test_n16_streams_that_interleave(llm: LLM) -> None:
    asked = [dictate(token_ids(llm, name), n=2) for name in (*TEXTS, *BYTES)]
    wholes = llm.generate(["A"] * len(asked), asked, use_tqdm=False)
    streams = [llm.generate_stream("A", params) for params in asked]
    seen: list[list[RequestOutput]] = [[] for _ in streams]
    for row in itertools.zip_longest(*streams):
        for outputs, output in zip(seen, row, strict=True):
            outputs += [] if output is None else [output]
    for outputs, whole in zip(seen, wholes, strict=True):
        check_stream(outputs, whole)
