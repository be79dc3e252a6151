"""SentencePiece models, against the sentencepiece package: real ones, and small ones trained here."""

import io
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairlead.errors import CheckpointError, ModelError, UnsupportedModelError
from fairlead.tokenization.sentencepiece import SentencePieceModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # from Python 3.12 on, SWIG's types warn about themselves
    sentencepiece = pytest.importorskip("sentencepiece", reason="the sentencepiece package is the reference")

WORDS = """the quick brown fox jumps over the lazy dog and another one said: well, well! who are you then?
def f(x):  return  [x * 10, 200, 3000]   # twice    the    space
naïve café über straße 日本語 中文 한국어 русский язык 🙂 é (decomposed: é) ﬁne ① ½"""
ALPHABET = " aab\t\n ▁é日🙂\u0301e1!..x<>s0=="
OWN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
TRAINED: dict[str, dict[str, Any]] = {
    "llama-like": {"model_type": "bpe", "byte_fallback": True, **OWN},
    "without bytes": {"model_type": "bpe", **OWN},
    "without a first space": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, **OWN},
    "symbols": {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<start>", "\t", "▁▁", "=="],
        **OWN,
    },
    "spaces removed": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
    "unigram": {"model_type": "unigram", **OWN},
    "unigram with bytes": {"model_type": "unigram", "byte_fallback": True, **OWN},
}


def train(**settings: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS.splitlines() * 3),
        model_writer=model,
        minloglevel=2,
        **{"vocab_size": 400, "hard_vocab_limit": False, "character_coverage": 0.98, **settings},
    )
    return model.getvalue()


def texts(rng: random.Random, number: int) -> list[str]:
    drawn = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 40))) for _ in range(number)]
    runs = [char * n for char in (" ", "a", "=", "\n", "▁", "日") for n in (1, 2, 3, 7, 8, 31, 40)]
    # SentencePiece takes the spelling of a control token for text; here it is that token.
    return ["", *(text for text in drawn if "<s>" not in text), *runs, *WORDS.splitlines()]


def check_equal(data: bytes, cases: list[str], *, decodes: bool = True) -> None:
    """Same ids as SentencePiece, and the same text of them."""
    reference = sentencepiece.SentencePieceProcessor(model_proto=data)
    model = SentencePieceModel.parse(data)
    backend = model.backend(prefix_every_text=True)
    assert backend.get_vocab_size() == reference.vocab_size()
    is_unigram, num_ties = backend.model.__class__.__name__ == "Unigram", 0
    for text in cases:
        expected = reference.encode(text)
        found = backend.encode(text, add_special_tokens=False).ids
        if is_unigram and found != expected:
            # The same pieces in another order are exactly as likely: rounding decides, which differs.
            assert sorted(found) == sorted(expected), text
            num_ties += 1
            continue
        assert found == expected, text
        # A model that takes spaces from the start of texts takes them from decoded ones, too; ours takes its own one.
        if decodes and not (model.remove_extra_whitespaces and text.lstrip(" ").startswith("▁")):
            assert backend.decode(found, skip_special_tokens=False) == reference.decode(expected), text
    assert num_ties <= len(cases) / 1000


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_model_cuts_text_as_sentencepiece_does(name: str, count: Callable[..., int]) -> None:
    # SentencePiece spells what it does not know as " ⁇ ", the tokenizers library by its name.
    decodes = bool(TRAINED[name].get("byte_fallback", False))
    check_equal(train(**TRAINED[name]), texts(random.Random(0), count(500, full=20_000)), decodes=decodes)


def test_characters_are_mapped_as_sentencepiece_maps_them() -> None:
    data = train(model_type="bpe", byte_fallback=True, normalization_rule_name="nmt_nfkc")
    check_equal(data, [*WORDS.replace("é", "").splitlines(), "ｆｕｌｌ ｗｉｄｔｈ", "a\u3000b", "x² ﬁ ①②"])


def test_the_real_model(test_data: Path, count: Callable[..., int]) -> None:
    """On every case of the vocabularies' own tests, on Shakespeare, and on what is drawn."""
    folder = test_data / "tokenizers"
    cases = texts(random.Random(1), count(2000, full=50_000))
    for file in sorted(folder.glob("*.inp")):
        cases += file.read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    play = (test_data / "tinyshakespeare.txt").read_text(encoding="utf-8")[: count(150_000, full=10**9)]
    cases += [play[i : i + 1500] for i in range(0, len(play), 1500)]
    check_equal((folder / "llama2-tokenizer.model").read_bytes(), cases)


def test_a_text_between_special_tokens_gets_a_space_where_asked_for() -> None:
    model = SentencePieceModel.parse(train(**TRAINED["llama-like"]))
    always, first = model.backend(prefix_every_text=True), model.backend(prefix_every_text=False)
    for backend, middle in ((always, "▁"), (first, "")):
        tokens = backend.encode("a</s>a</s> a", add_special_tokens=False).tokens
        assert "".join(tokens) == f"▁a</s>{middle}a</s>{middle}▁a"


def test_control_pieces_are_special_and_others_are_not() -> None:
    model = SentencePieceModel.parse(train(**TRAINED["symbols"]))
    added = model.backend(prefix_every_text=True).get_added_tokens_decoder()
    assert {token.content: token.special for token in added.values()} == {
        "<unk>": True, "<s>": True, "</s>": True, "<start>": False, "\t": False, "▁▁": False, "==": False,
    }  # fmt: skip
    assert (model.bos, model.eos, model.unknown_id) == ("<s>", "</s>", 0)


def test_a_model_without_bos_has_none() -> None:
    model = SentencePieceModel.parse(train(**TRAINED["llama-like"], bos_id=-1))
    assert (model.bos, model.eos) == (None, "</s>")


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_kinds_of_models_are_refused(kind: str) -> None:
    data = train(model_type=kind, use_all_vocab=True) if kind == "word" else train(model_type=kind)
    with pytest.raises(UnsupportedModelError, match=f"of type {kind} are not supported; BPE and unigram are"):
        SentencePieceModel.parse(data)


def test_spaces_behind_words_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="spaces at the end of words"):
        SentencePieceModel.parse(train(model_type="bpe", treat_whitespace_as_suffix=True))


def field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2, len(value)]) + value


def piece(text: str, kind: int = 1) -> bytes:
    score = bytes([2 << 3 | 5]) + struct.pack("<f", -1.0)
    return field(1, field(1, text.encode()) + score + bytes([3 << 3, kind]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "none is the unknown one"),
        (b"\x80", "no SentencePiece model"),
        (b"\xff" * 20, "a number without an end"),
        (b"\x0b", "wire type 3"),
        (b"\x0a\x7fabc", "a field of 127 bytes at byte 2 of 5"),
        (piece("<unk>", 2) + piece("a") + piece("a"), "not distinct"),
        (piece("<unk>", 2) + piece(""), "not distinct"),
        (piece("<unk>", 2) + piece("?", 2), "none is the unknown one"),
        (piece("<unk>", 2) + piece("a", 9), "unknown type 9"),
        (piece("<unk>", 2) + field(1, field(1, b"\xff")), "can't decode byte 0xff"),
        (piece("<unk>", 2) + b"\x08\x01", "a number in place of bytes"),
        (piece("<unk>", 2) + field(2, field(3, b"x")), "field 3 is no number"),
    ],
)
def test_a_broken_file_is_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        SentencePieceModel.parse(data)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_fuzzed_files_are_read_or_refused(count: Callable[..., int]) -> None:
    rng = random.Random(2)
    good = b"".join(piece(text, kind) for text, kind in (("<unk>", 2), ("a", 1), ("▁", 1), ("▁a", 1)))
    good += field(2, bytes([3 << 3, 2]))
    assert len(SentencePieceModel.parse(good).pieces) == 4
    refused = 0
    for _ in range(count(3000, full=100_000)):
        data = bytearray(good[: rng.randrange(len(good) + 1)] if rng.random() < 0.3 else good)
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            SentencePieceModel.parse(bytes(data))
        except ModelError:
            refused += 1
    assert refused > 100
