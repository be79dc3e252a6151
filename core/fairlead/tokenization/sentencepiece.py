"""SentencePiece models (`tokenizer.model`) as backends of the tokenizers library, without the sentencepiece package.

The file is one protobuf message; the handful of fields that decide how text is cut are read here.
Sources: https://github.com/google/sentencepiece, src/sentencepiece_model.proto, for the fields and their defaults;
Kudo and Richardson, "SentencePiece" (2018), section 3; https://protobuf.dev/programming-guides/encoding for the bytes.

What differs from SentencePiece itself: control symbols that a text spells out become their tokens, as in every other
tokenizer here; a user-defined symbol at the very start of a text gets no space before it; and where a model has a map
of characters (NFKC, say), the tokenizers library loses a combining mark behind a character that the map changes.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fairlead.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_UNIGRAM, _BPE = 1, 2
_MODEL_TYPES = {_UNIGRAM: "unigram", _BPE: "BPE", 3: "word", 4: "char"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MAX_VARINT_BYTES = 10
_SPACE = "▁"

Fields = dict[int, list[int | bytes]]
"""A protobuf message: field number to its values, in order; numbers of a fixed width are left as bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One entry of the vocabulary; its id is its place."""

    text: str
    score: float = 0.0
    kind: int = _NORMAL

    @property
    def is_control(self) -> bool:
        """Whether it stands for no text, such as <s>."""
        return self.kind in (_CONTROL, _UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What a `tokenizer.model` says. `bos` and `eos` are control pieces, or None where the model has none."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    bos: str | None
    eos: str | None

    @classmethod
    def parse(cls, data: bytes) -> "SentencePieceModel":
        """Reads the file's bytes. Raises CheckpointError if they are no such model, UnsupportedModelError if it is of
        a kind that is not served."""
        try:
            model = _message(data)
            pieces = tuple(_piece(_bytes(entry)) for entry in model.get(1, []))
            trainer, normalizer = (_message(_bytes((model.get(n) or [b""])[-1])) for n in (2, 3))
            model_type = _int(trainer, 3, _UNIGRAM)
            if model_type not in (_UNIGRAM, _BPE):
                kind = _MODEL_TYPES.get(model_type, str(model_type))
                raise UnsupportedModelError(
                    f"SentencePiece models of type {kind} are not supported; BPE and unigram are"
                )
            if _int(trainer, 24, 0):
                raise UnsupportedModelError("SentencePiece models with spaces at the end of words are not supported")
            controls = {piece.text for piece in pieces if piece.kind == _CONTROL}
            bos, eos = _text(trainer, 46, "<s>"), _text(trainer, 47, "</s>")
            found = cls(
                pieces=pieces,
                model_type=model_type,
                byte_fallback=bool(_int(trainer, 35, 0)),
                charsmap=_bytes((normalizer.get(2) or [b""])[-1]),
                add_dummy_prefix=bool(_int(normalizer, 3, 1)),
                remove_extra_whitespaces=bool(_int(normalizer, 4, 1)),
                bos=bos if bos in controls else None,
                eos=eos if eos in controls else None,
            )
        except (ValueError, IndexError, struct.error) as error:
            raise CheckpointError(f"it is no SentencePiece model: {error}") from error
        texts = {piece.text for piece in pieces}
        if len(texts) != len(pieces) or "" in texts or [p.kind for p in pieces].count(_UNKNOWN) != 1:
            raise CheckpointError(
                "it is no SentencePiece model: its pieces are not distinct, or none is the unknown one"
            )
        return found

    @property
    def unknown_id(self) -> int:
        """The id of what has no piece."""
        return next(i for i, piece in enumerate(self.pieces) if piece.kind == _UNKNOWN)

    def renamed(self, texts: Mapping[int, str]) -> "SentencePieceModel":
        """The model with other texts for some pieces, such as reserved ones, which are then the caller's to add; ids
        beyond its own are passed over."""
        pieces = list(self.pieces)
        for i, text in texts.items():
            if 0 <= i < len(pieces) and pieces[i].text != text:
                pieces[i] = replace(pieces[i], text=text, kind=_UNUSED)
        return replace(self, pieces=tuple(pieces))

    def backend(self, *, prefix_every_text: bool) -> "Tokenizer":
        """The tokenizer of this model.

        Where special tokens cut a text into several, `prefix_every_text` puts the space of a text's start before each
        of them, as SentencePiece would if it were called for each; else only the first one gets it.
        """
        from tokenizers import AddedToken, Tokenizer, models

        pieces, unknown = self.pieces, self.pieces[self.unknown_id].text
        if self.model_type == _BPE:
            vocab = {piece.text: i for i, piece in enumerate(pieces)}
            found = Tokenizer(
                models.BPE(vocab, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=self.byte_fallback)
            )
        else:
            scored = [(piece.text, piece.score) for piece in pieces]
            found = Tokenizer(models.Unigram(scored, unk_id=self.unknown_id, byte_fallback=self.byte_fallback))
        self._set_steps(found, prefix_every_text)
        # User-defined symbols are sought in the normalised text: some are runs of spaces.
        found.add_special_tokens([AddedToken(p.text, normalized=False) for p in pieces if p.is_control])
        found.add_tokens([AddedToken(p.text, normalized=True) for p in pieces if p.kind == _USER_DEFINED])
        return found

    def _set_steps(self, backend: "Tokenizer", prefix_every_text: bool) -> None:
        from tokenizers import Regex, decoders, normalizers, pre_tokenizers

        steps: list[normalizers.Normalizer] = []
        if self.charsmap:
            steps.append(normalizers.Precompiled(self.charsmap))
        if self.remove_extra_whitespaces:
            steps += [normalizers.Replace(Regex(rf"\A +|[ {_SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
        if self.add_dummy_prefix:
            # Metaspace puts its character only before a text that does not begin with it, SentencePiece always. No
            # normalised text has a plain space, so a plain one is put first, which the second step then replaces.
            is_cut = any(piece.kind == _USER_DEFINED for piece in self.pieces)  # these cut a text too, and get none
            scheme = "always" if prefix_every_text and not is_cut else "first"
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
                    pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False),
                ]
            )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace(_SPACE, " "),
                *([decoders.ByteFallback()] if self.byte_fallback else []),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if self.add_dummy_prefix else []),
            ]
        )


def _merges(pieces: tuple[Piece, ...]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best piece first: SentencePiece's BPE joins whichever
    neighbours make the piece of the highest score."""
    normal = {piece.text for piece in pieces if piece.kind == _NORMAL}
    merges = []
    for piece in sorted((p for p in pieces if p.kind == _NORMAL), key=lambda p: -p.score):
        text = piece.text
        for i in range(1, len(text)):
            if text[:i] in normal and text[i:] in normal:
                merges.append((text[:i], text[i:]))
    return merges


def _piece(data: bytes) -> Piece:
    fields = _message(data)
    [score] = struct.unpack("<f", _bytes((fields.get(2) or [bytes(4)])[-1]))
    kind = _int(fields, 3, _NORMAL)
    if kind not in range(_NORMAL, _BYTE + 1):
        raise ValueError(f"a piece has the unknown type {kind}")
    return Piece(text=_text(fields, 1, ""), score=score, kind=kind)


def _message(data: bytes) -> Fields:
    """Takes a protobuf message apart. Raises ValueError or IndexError on bytes that are none."""
    fields: Fields = {}
    for number, value in _fields(data):
        fields.setdefault(number, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            length, position = _varint(data, position)
        elif wire_type in (1, 5):
            length = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + length > len(data):
            raise ValueError(f"a field of {length} bytes at byte {position} of {len(data)}")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of up to ten bytes of seven bits, and where it ends."""
    value = 0
    for i in range(_MAX_VARINT_BYTES):
        byte = data[position + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise ValueError(f"a number without an end at byte {position}")


def _int(fields: Fields, number: int, default: int) -> int:
    value = (fields.get(number) or [default])[-1]
    if not isinstance(value, int):
        raise ValueError(f"field {number} is no number")
    return value


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number in place of bytes")
    return value


def _text(fields: Fields, number: int, default: str) -> str:
    return _bytes((fields.get(number) or [default.encode()])[-1]).decode()
