"""Real vocabularies (GPT-2, Llama, Phi-3, Qwen2): their own test cases, streamed and at once."""

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fairlead.request import SamplingParams
from fairlead.tokenization.detokenizer import Detokenizer
from fairlead.tokenization.tokenizer import Tokenizer

SEPARATOR = "\n__ggml_vocab_test__\n"
NAMES = {
    "gpt-2": "ggml-vocab-gpt-2.gguf",
    "llama-bpe": "ggml-vocab-llama-bpe.gguf",
    "llama-spm": "ggml-vocab-llama-spm.gguf",
    "phi-3": "ggml-vocab-phi-3.gguf",
    "qwen2": "ggml-vocab-qwen2.gguf",
    "llama2": "ggml-vocab-llama-spm.gguf",  # the same vocabulary, from its tokenizer.model
}
HARD = [
    "🙂",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈🇩🇪",
    "a🙂b🙂",
    "日本語のテキスト、漢字",
    "中文，標點。한국어 텍스트",
    "e\u0301a\u0308 n\u0303 Z\u0351\u036b\u0343a\u0329\u033b",
    "ภาษาไทย กำ",
    "עִבְרִית العَرَبِيَّة",
    "\u200b\u200d\ufeff",
    "  a  b\n\n\tc ",
    "½ ² ﬁ Ⅳ",
]


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(name: str, tokenizer_named: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_named(name)


@pytest.fixture(scope="module")
def cases(name: str, test_data: Path) -> list[str]:
    data = (test_data / "tokenizers" / f"{NAMES[name]}.inp").read_bytes().decode()
    *found, behind = data.split(SEPARATOR)
    assert behind == ""
    return found


def streamed(tokenizer: Tokenizer, ids: list[int], chunk: int, **params: object) -> tuple[str, Detokenizer]:
    detokenizer = Detokenizer(tokenizer, [], SamplingParams(skip_special_tokens=False, **params))  # type: ignore[arg-type]
    pieces = [detokenizer.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)]
    return "".join(pieces) + detokenizer.finish(), detokenizer


def check(tokenizer: Tokenizer, ids: list[int]) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    for chunk in (1, 2, 3, 7):
        assert streamed(tokenizer, ids, chunk)[0] == whole


def test_token_ids_are_those_of_the_vocabularys_own_cases(
    name: str, tokenizer: Tokenizer, cases: list[str], test_data: Path
) -> None:
    """Which shows that the backends are built rightly."""
    lines = (test_data / "tokenizers" / f"{NAMES[name]}.out").read_text().splitlines()
    assert len(lines) == len(cases) > 30
    for text, line in zip(cases, lines, strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == [int(i) for i in line.split()], text


def test_every_case_streams_to_the_whole_text(tokenizer: Tokenizer, cases: list[str]) -> None:
    for text in [*cases, *HARD]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        check(tokenizer, ids)
        assert streamed(tokenizer, tokenizer.encode_continuation(text), 1)[0].lstrip(" ") == text.lstrip(" ")


def byte_runs(rng: random.Random, count: int) -> Iterator[bytes]:
    """Random bytes, and characters cut short, in a wrong order or among others."""
    for _ in range(count):
        data = bytearray(rng.randbytes(rng.randrange(1, 24)))
        if rng.random() < 0.7:
            data[rng.randrange(len(data)) :] = rng.choice(HARD).encode()[rng.randrange(2) : rng.randrange(3, 20)]
        yield bytes(data)


def test_random_bytes_stream_to_the_whole_text(tokenizer: Tokenizer, count: Callable[..., int]) -> None:
    """By tokens of single bytes, among ordinary ones, and by tokens drawn from the whole vocabulary."""
    rng = random.Random(5)
    token_of = {tokenizer.token_bytes(i): i for i in range(300) if len(tokenizer.token_bytes(i)) == 1}
    assert len(token_of) == 256
    word = tokenizer.encode_continuation("word")
    for data in byte_runs(rng, count(150, full=20_000)):
        ids = [token_of[bytes([byte])] for byte in data]
        check(tokenizer, ids)
        check(tokenizer, [*word, *ids, *word])
        check(tokenizer, rng.choices(range(tokenizer.vocab_size), k=rng.randrange(1, 12)))


def test_stop_strings_that_straddle_tokens_and_chunks_cut_exactly(
    tokenizer: Tokenizer, cases: list[str], count: Callable[..., int]
) -> None:
    rng = random.Random(6)
    texts = [text for text in [*cases, *HARD] if len(text) > 3]
    for text, chunk, include in itertools.product(texts, (1, 4), (False, True)):
        ids = tokenizer.encode_continuation(text)
        whole = tokenizer.decode(ids, skip_special_tokens=False)
        for _ in range(count(2, full=50)):
            start = rng.randrange(len(whole))
            stop = whole[start : start + rng.randrange(1, 7)]
            found, detokenizer = streamed(tokenizer, ids, chunk, stop=(stop,), include_stop_str_in_output=include)
            end = whole.index(stop) + (len(stop) if include else 0)
            assert (found, detokenizer.stop) == (whole[:end], stop)
