"""Tokenizers of every decoder family: the demo's, small ones built here, and real ones where the data is."""

import os
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fairlead import demo
from fairlead.tokenization.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["he", "ll", "hell", "▁he", "▁hell", "lo", "▁w", "or", "▁wor", "ld", "▁▁", "é", "日", "🙂", "</think>"]
REAL = {"real-llama-spm": "ggml-vocab-llama-spm.gguf"}


def _wrap(backend: Backend) -> Tokenizer:
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(TokenizersBackend(tokenizer_object=backend, **named), source="a test")


def _sentencepiece() -> Tokenizer:
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, *string.punctuation]
    pieces += [piece for piece in ["\n", *WORDS] if piece not in pieces]
    merges = [("h", "e"), ("l", "l"), ("▁", "he"), ("l", "o"), ("▁", "w"), ("o", "r"), ("l", "d"), ("▁", "▁")]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True
    )
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return _wrap(backend)


def _metaspace() -> Tokenizer:
    pieces = [*SPECIAL, "▁", *string.ascii_letters, *WORDS]
    backend = Backend(models.WordLevel({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return _wrap(backend)


def _wordpiece() -> Tokenizer:
    pieces = [*SPECIAL, *string.ascii_letters, *(f"##{c}" for c in string.ascii_letters), "he", "##llo", ".", "'", "é"]
    backend = Backend(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _wrap(backend)


def _suffix() -> Tokenizer:
    pieces = [*SPECIAL, *string.ascii_letters, *(f"{c}</w>" for c in string.ascii_letters), "he", "llo</w>"]
    backend = Backend(models.WordLevel({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="<unk>"))
    backend.decoder = decoders.BPEDecoder()
    return _wrap(backend)


def _no_decoder() -> Tokenizer:
    backend = Backend(models.WordLevel({p: i for i, p in enumerate([*SPECIAL, "a", "b", "hello"])}, unk_token="<unk>"))
    return _wrap(backend)


BUILT: dict[str, Callable[[], Tokenizer]] = {
    "demo": lambda: load_tokenizer(demo.path()),
    "sentencepiece": _sentencepiece,
    "metaspace": _metaspace,
    "wordpiece": _wordpiece,
    "suffix": _suffix,
    "no-decoder": _no_decoder,
}


def _real(name: str) -> Tokenizer:
    data = os.environ.get("FAIRLEAD_TEST_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data"
    directory = Path(data) / "tokenizers"
    if not (directory / REAL[name]).is_file():
        pytest.skip(f"no {REAL[name]} in {directory}; set FAIRLEAD_TEST_DATA")
    pytest.importorskip("gguf", reason="the gguf package reads the real tokenizers")
    from transformers import AutoTokenizer

    return Tokenizer(AutoTokenizer.from_pretrained(str(directory), gguf_file=REAL[name]), source=name)


@pytest.fixture(scope="session")
def tokenizer_named() -> Callable[[str], Tokenizer]:
    made: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name not in made:
            made[name] = _real(name) if name in REAL else BUILT[name]()
        return made[name]

    return get


@pytest.fixture(scope="session", params=[*BUILT, *REAL])
def tokenizer(request: pytest.FixtureRequest, tokenizer_named: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_named(request.param)


@pytest.fixture(scope="session")
def demo_tokenizer(tokenizer_named: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_named("demo")


@pytest.fixture(scope="session")
def spm_tokenizer(tokenizer_named: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_named("sentencepiece")
