"""Tokenizers of every decoder family: the demo's, small ones built here, and real ones where the data is."""

import os
import string
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fairlead import demo
from fairlead.tokenization.sentencepiece import Piece, SentencePieceModel
from fairlead.tokenization.tokenizer import Tokenizer, load_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = ["he", "ll", "hell", "▁he", "▁hell", "lo", "▁w", "or", "▁wor", "ld", "▁▁", "é", "日", "🙂", "</think>"]
REAL = {
    "gpt-2": "ggml-vocab-gpt-2.gguf",
    "llama-bpe": "ggml-vocab-llama-bpe.gguf",
    "llama-spm": "ggml-vocab-llama-spm.gguf",
    "phi-3": "ggml-vocab-phi-3.gguf",
    "qwen2": "ggml-vocab-qwen2.gguf",
    "llama2": "llama2-tokenizer.model",
}
SPLITS = {  # a regular expression finds the words; those of GPT-2 are the ByteLevel step's own
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


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


def _metadata(data: bytes) -> dict[str, Any]:
    """What stands before the tensors of a GGUF file. Source: github.com/ggml-org/ggml, docs/gguf.md."""
    formats = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    position = 8  # behind magic and version

    def numbers(form: str, count: int = 1) -> tuple[Any, ...]:
        nonlocal position
        found = struct.unpack_from(f"<{count}{form}", data, position)
        position += struct.calcsize(f"<{count}{form}")
        return found

    def text() -> str:
        nonlocal position
        (size,) = numbers("Q")
        position += size
        return data[position - size : position].decode("utf-8", "replace")

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind != 9:
            return numbers(formats[kind])[0]
        (kind,), (count,) = numbers("I"), numbers("Q")
        return [text() for _ in range(count)] if kind == 8 else numbers(formats[kind], count)

    _, num_entries = numbers("Q", 2)
    return {text(): value(*numbers("I")) for _ in range(num_entries)}


def _byte_level(meta: dict[str, Any]) -> Backend:
    tokens, kind = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.pre"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, merges, ignore_merges=kind == "llama-bpe")
    backend = Backend(model)
    split = [pre_tokenizers.Split(Regex(SPLITS[kind]), "isolated")] if kind in SPLITS else []
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, words])
    backend.decoder = decoders.ByteLevel()
    controls = [i for i, kind in enumerate(meta["tokenizer.ggml.token_type"]) if kind in (3, 4)]
    backend.add_special_tokens([AddedToken(tokens[i], normalized=False) for i in controls])
    return backend


def _sentencepiece_of(meta: dict[str, Any]) -> SentencePieceModel:
    columns = (meta[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    pieces = [Piece(text=text, score=score, kind=kind) for text, score, kind in zip(*columns, strict=True)]
    unknown = meta["tokenizer.ggml.unknown_token_id"]
    pieces[unknown] = replace(pieces[unknown], kind=2)
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=2,
        byte_fallback=True,
        charsmap=b"",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        bos="<s>",
        eos="</s>",
    )


def _real(name: str) -> Tokenizer:
    """Vocabulary and merges of a file, as a backend of the tokenizers library."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    data = os.environ.get("FAIRLEAD_TEST_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data"
    file = Path(data) / "tokenizers" / REAL[name]
    if not file.is_file():
        pytest.skip(f"{file} is missing; set FAIRLEAD_TEST_DATA")
    if file.suffix == ".model":
        backend = SentencePieceModel.parse(file.read_bytes()).backend(prefix_every_text=True)
    else:
        meta = _metadata(file.read_bytes())
        is_bpe = meta["tokenizer.ggml.model"] == "gpt2"
        backend = _byte_level(meta) if is_bpe else _sentencepiece_of(meta).backend(prefix_every_text=True)
    return Tokenizer(TokenizersBackend(tokenizer_object=backend), source=name)


@pytest.fixture(scope="session")
def tokenizer_named() -> Callable[[str], Tokenizer]:
    made: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name not in made:
            made[name] = _real(name) if name in REAL else BUILT[name]()
        return made[name]

    return get


@pytest.fixture(scope="session", params=[*BUILT, "llama-spm", "qwen2"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_named: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_named(request.param)


@pytest.fixture(scope="session")
def demo_tokenizer(tokenizer_named: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_named("demo")


@pytest.fixture(scope="session")
def spm_tokenizer(tokenizer_named: Callable[[str], Tokenizer]) -> Tokenizer:
    return tokenizer_named("sentencepiece")
