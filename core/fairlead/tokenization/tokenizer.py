"""Text to token ids and back, on transformers' fast tokenizers. Importing this module imports no transformers."""

import json
import re
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fairlead.errors import CheckpointError, ModelNotFoundError, RequestError, UnsupportedModelError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
)
_REMEDY = "give another directory with --tokenizer, or send token ids with --skip-tokenizer-init"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NEWLINE = "\n"


class TransformersTokenizer(Protocol):
    """What Fairlead uses of a transformers tokenizer."""

    chat_template: str | dict[str, str] | None
    bos_token: str | None
    eos_token: str | None
    eos_token_id: int | list[int] | None

    @property
    def backend_tokenizer(self) -> "tokenizers.Tokenizer": ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **kwargs: Any) -> Any: ...


def load_tokenizer(directory: Path | str, *, revision: str | None = None) -> "Tokenizer":
    """Load the tokenizer of a directory, or of a Hugging Face id; code that comes with it is never run.

    A `tokenizer_class` of `TokenizersBackend` (the demo's) is loaded without importing torch: 0.7 s instead of 2.5 s,
    nearly all of it the import. The other classes need AutoTokenizer, which imports torch.

    A tokenizer.model without a tokenizer.json is read by us (see model_file).

    Raises ModelNotFoundError without tokenizer files, UnsupportedModelError if it needs its own code or has no fast
    tokenizer, CheckpointError if a file is broken.
    """
    path = Path(directory).expanduser()
    if path.is_dir():
        if not any(True for pattern in TOKENIZER_FILES for _ in path.glob(pattern)):
            raise ModelNotFoundError(f"no tokenizer in {path}: looked for {', '.join(TOKENIZER_FILES)}; {_REMEDY}")
    elif path.exists() or str(directory).startswith(("/", ".", "~")) or str(directory).count("/") > 1:
        raise ModelNotFoundError(f"{directory} is not a directory, so it holds no tokenizer; {_REMEDY}")
    source = str(path) if path.is_dir() else str(directory)
    more_ends: tuple[str, ...] = ()
    try:
        if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").is_file():
            from fairlead.tokenization import model_file

            found = model_file.load(path)
            loaded, more_ends = found.transformers_tokenizer, found.more_ends
        else:
            loaded = _load_transformers(path, source, revision)
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{_one_line(error, limit=600)}; {_REMEDY}") from error
    except ImportError as error:
        raise UnsupportedModelError(f"the tokenizer of {source} needs a package: {_one_line(error)}") from error
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(f"the tokenizer of {source} needs its own code, which is not run") from error
        if isinstance(error, OSError) and not path.is_dir():
            message = f"no tokenizer found for {source}: {_one_line(error)}; {_REMEDY}"
            raise ModelNotFoundError(message) from error
        raise CheckpointError(f"the tokenizer of {source} cannot be read: {_one_line(error)}; {_REMEDY}") from error
    return Tokenizer(loaded, source=source, more_ends=more_ends)


def _load_transformers(path: Path, source: str, revision: str | None) -> TransformersTokenizer:
    if (path / "tokenizer.json").is_file() and _declares_plain_backend(path / "tokenizer_config.json"):
        from transformers.tokenization_utils_tokenizers import TokenizersBackend

        return cast(TransformersTokenizer, TokenizersBackend.from_pretrained(source))
    from transformers import AutoTokenizer

    return cast(
        TransformersTokenizer, AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    )


def _declares_plain_backend(config_path: Path) -> bool:
    """Whether tokenizer_config.json says that tokenizer.json is all there is, as AutoTokenizer would conclude."""
    if not config_path.is_file():
        return False
    config = json.loads(config_path.read_text(encoding="utf-8"))
    return (
        isinstance(config, dict) and config.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in config
    )


def _one_line(error: Exception, limit: int = 300) -> str:
    return " ".join(str(error).split())[:limit]


class Tokenizer:
    """A fast tokenizer. Safe to share among threads: nothing of the backend is changed after construction.

    `transformers_tokenizer` is the wrapped object (chat_template, bos_token, eos_token), `backend` the tokenizers
    library's one, `eos_token_ids` what the tokenizer's own files and `more_ends` call the end of a text, `vocab_size`
    the number of ids with the added tokens. `added_tokens` maps an added token's spelling to whether it is special.
    """

    def __init__(
        self, transformers_tokenizer: TransformersTokenizer, *, source: str = "", more_ends: Seq[str] = ()
    ) -> None:
        backend = getattr(transformers_tokenizer, "backend_tokenizer", None)
        if backend is None:
            kind = type(transformers_tokenizer).__name__
            raise UnsupportedModelError(
                f"the tokenizer of {source} is a {kind}, which has no fast form; convert it to a tokenizer.json"
            )
        backend.no_truncation()
        backend.no_padding()
        self.transformers_tokenizer = transformers_tokenizer
        self.backend: tokenizers.Tokenizer = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        eos = transformers_tokenizer.eos_token_id
        ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
        ends = [*ends, *map(backend.token_to_id, more_ends)]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(ends))
        added = backend.get_added_tokens_decoder()
        self.added_tokens: dict[str, bool] = {token.content: token.special for token in added.values()}
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        kinds = _decoder_kinds(backend)
        self.is_byte_level = kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}
        self.has_byte_fallback = "ByteFallback" in kinds
        if "ByteLevel" in kinds and not self.is_byte_level:
            steps = ", ".join(kinds)
            raise UnsupportedModelError(f"the decoder of {source}'s tokenizer mixes ByteLevel with others: {steps}")
        self.anchor_id = self._find_anchor()
        self._newline_ids = self._encode(_NEWLINE, add_special_tokens=False)
        self._token_bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; spellings of added tokens in it become those tokens. Raises RequestError if it is no
        valid Unicode."""
        return self._encode(text, add_special_tokens=add_special_tokens)

    def encode_batch(self, texts: Seq[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of every text, in parallel."""
        try:
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise _not_unicode() from error
        return [encoding.ids for encoding in found]

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that follows another one: no special tokens, and no space that a start would get."""
        ids = self._encode(_NEWLINE + text, add_special_tokens=False)
        size = len(self._newline_ids)
        if ids[:size] == self._newline_ids:
            return ids[size:]
        return self._encode(text, add_special_tokens=False)

    def decode(self, ids: Seq[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, exactly as the backend decodes them; ids without a token are passed over."""
        return str(self.backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text when it follows another one; part of a character for a byte token."""
        found = self._token_bytes.get(token_id)
        if found is None:
            found = self._token_bytes[token_id] = self._bytes_of(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for the parts of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_byte_token(self, token_id: int) -> bool:
        """Whether the token stands for one raw byte that the decoder joins with its neighbours."""
        return self.has_byte_fallback and _BYTE_TOKEN.fullmatch(self.backend.id_to_token(token_id) or "") is not None

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError as error:
            raise _not_unicode() from error

    def _bytes_of(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            if all(char in BYTE_OF_CHAR for char in token):
                return bytes(BYTE_OF_CHAR[char] for char in token)
            return token.encode()
        byte = _BYTE_TOKEN.fullmatch(token) if self.has_byte_fallback else None
        if byte:
            return bytes([int(byte[1], 16)])
        before = [self.anchor_id]
        text = self.decode([*before, token_id], skip_special_tokens=False)
        return text[len(self.decode(before, skip_special_tokens=False)) :].encode()

    def _find_anchor(self) -> int:
        """A token with a printable text, to decode others behind."""
        ids = self._encode("a", add_special_tokens=False)
        return ids[-1] if ids else 0


def _not_unicode() -> RequestError:
    return RequestError("the text is not valid Unicode: it has a lone surrogate; send whole characters", param="prompt")


def _decoder_kinds(backend: "tokenizers.Tokenizer") -> list[str]:
    """The decoder's steps by name, in order."""
    if backend.decoder is None:
        return []
    found: list[str] = []
    open_steps = [json.loads(backend.decoder.__getstate__())]
    while open_steps:
        step = open_steps.pop(0)
        if step["type"] == "Sequence":
            open_steps = [*step["decoders"], *open_steps]
        else:
            found.append(step["type"])
    return found


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable character of every byte, inverted. Source: openai/gpt-2, encoder.py, bytes_to_unicode."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()
