"""Tokenizers whose vocabulary is a `tokenizer.model`: SentencePiece, and the rank file of GLM-4's tiktoken.

Both are read by us, so neither the sentencepiece package nor any code that comes with a checkpoint is needed.
tokenizer_config.json adds what these files do not say: further tokens, the chat template, what stands around a text.
ChatGLM's own tokenizers keep some of that in their code; it is written down here.
Sources: Team GLM, "ChatGLM: A Family of Large Language Models" (2024), section 2, and the tokenizers that the model
repositories of ChatGLM3 and GLM-4 ship; https://github.com/openai/tiktoken, README, for the rank file.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairlead.errors import CheckpointError, UnsupportedModelError
from fairlead.tokenization.sentencepiece import SentencePieceModel
from fairlead.tokenization.tokenizer import BYTE_OF_CHAR, TransformersTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAME = "tokenizer.model"
_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]{1,7}\r?\n")
_MAX_ADDED = 2**16  # far above any tokenizer, so that a broken id cannot make tokens for ever

_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_CHATGLM_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_ROLES)
_IMAGE_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
_GLM4_TOKENS = ("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *_ROLES, *_IMAGE_TOKENS)
_GLM4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAR_OF_BYTE = {byte: char for char, byte in BYTE_OF_CHAR.items()}
_GLM_TURN_ENDS = ("<|user|>", "<|observation|>")  # an answer ends where somebody else's turn begins


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFileTokenizer:
    """A loaded tokenizer, and the spellings of tokens that end a text besides its eos_token."""

    transformers_tokenizer: TransformersTokenizer
    more_ends: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What one kind of file settles: the backend, the names of its tokens, and what stands before every text."""

    backend: "Tokenizer"
    names: Mapping[str, str | None]
    prefix: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()


def load(directory: Path) -> ModelFileTokenizer:
    """Loads the directory's tokenizer.model. Raises CheckpointError or UnsupportedModelError in one line."""
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    config = _read_json(directory / "tokenizer_config.json")
    is_glm = str(config.get("tokenizer_class", "")).startswith("ChatGLM") or (
        _read_json(directory / "config.json").get("model_type") == "chatglm"
    )
    file = directory / NAME
    added = _added_tokens(directory, config)
    try:
        data = file.read_bytes()
        if not _RANK_LINE.match(data):
            found = _sentencepiece(data, config, added, is_glm=is_glm)
        elif is_glm:
            found = _glm4(data, added)
        else:
            raise UnsupportedModelError(
                "of tiktoken's rank files only GLM-4's are read; convert it to a tokenizer.json"
            )
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{file}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    _surround(found)
    make: Callable[..., TransformersTokenizer] = TokenizersBackend
    tokenizer = make(
        tokenizer_object=found.backend,
        chat_template=_chat_template(directory, config),
        **{name: token for name, token in found.names.items() if token is not None},
    )
    return ModelFileTokenizer(transformers_tokenizer=tokenizer, more_ends=_GLM_TURN_ENDS if is_glm else ())


def _sentencepiece(data: bytes, config: Mapping[str, Any], added: dict[int, Any], *, is_glm: bool) -> _Found:
    model = SentencePieceModel.parse(data)
    if not is_glm:
        model = model.renamed({i: entry["content"] for i, entry in added.items()})
    backend = model.backend(prefix_every_text=config.get("legacy") is not False)
    unknown = model.pieces[model.unknown_id].text
    if is_glm:
        first = len(model.pieces)
        _add(backend, {first + i: _chatglm_token(token) for i, token in enumerate(_CHATGLM_TOKENS)})
        names = {"unk_token": unknown, "pad_token": unknown, "eos_token": model.eos}
        return _Found(backend=backend, names=names, prefix=("[gMASK]", "sop"))
    _add(backend, added)
    names = {
        "unk_token": _token_name(config, "unk_token") or unknown,
        "bos_token": _token_name(config, "bos_token") or model.bos,
        "eos_token": _token_name(config, "eos_token") or model.eos,
        "pad_token": _token_name(config, "pad_token"),
    }
    bos, eos = names["bos_token"], names["eos_token"]
    return _Found(
        backend=backend,
        names=names,
        prefix=(bos,) if bos is not None and config.get("add_bos_token", True) else (),
        suffix=(eos,) if eos is not None and config.get("add_eos_token", False) else (),
    )


def _chatglm_token(content: str) -> dict[str, Any]:
    """Those without brackets count as words of their own only: "philosophy" has no "sop" in it."""
    return {"content": content, "special": True, "single_word": content.isalpha()}


def _glm4(data: bytes, added: dict[int, Any]) -> _Found:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks = _read_ranks(data)
    shown = {token: "".join(_CHAR_OF_BYTE[byte] for byte in token) for token in ranks}
    merges = [(shown[left], shown[right]) for left, right in _tiktoken_merges(ranks)]
    vocab = {shown[token]: rank for token, rank in ranks.items()}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GLM4_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    known = {len(ranks) + i: {"content": token, "special": True} for i, token in enumerate(_GLM4_TOKENS)}
    _add(backend, {**known, **added})
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return _Found(backend=backend, names=names, prefix=("[gMASK]", "<sop>"))


def _read_ranks(data: bytes) -> dict[bytes, int]:
    """Token to rank, which is its id, in order of rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        if not _RANK_LINE.fullmatch(line if line.endswith(b"\n") else line + b"\n"):
            raise CheckpointError(f"line {number} is no token and rank")
        token, rank = line.split()
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except binascii.Error as error:
            raise CheckpointError(f"line {number} is no token in base64: {error}") from error
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    if list(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise CheckpointError("its ranks do not count up from 0, or a byte has no token")
    return ranks


def _tiktoken_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two parts that each longer token was made of when it was its turn.

    tiktoken joins the neighbours that make the token of the lowest rank until none can be joined; done with the tokens
    before it alone, that leaves a token's two parts.
    """
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
            best = min(joined)
            if best >= rank:
                break
            i = joined.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def _surround(found: _Found) -> None:
    """Puts the tokens that belong there before and behind a text."""
    from tokenizers import processors

    tokens = (*found.prefix, *found.suffix)
    ids = {token: found.backend.token_to_id(token) for token in tokens}
    unknown = next((token for token, token_id in ids.items() if token_id is None), None)
    if unknown is not None:
        raise CheckpointError(f"the tokenizer has no token {unknown!r}, which is to stand around every text")
    if tokens:
        template = [*found.prefix, "$A", *found.suffix]
        found.backend.post_processor = processors.TemplateProcessing(
            single=template, pair=[*template, "$B:1"], special_tokens=list(ids.items())
        )


def _added_tokens(directory: Path, config: Mapping[str, Any]) -> dict[int, Any]:
    """The tokens beside the vocabulary by id: of tokenizer_config.json, else of the older added_tokens.json."""
    listed = config.get("added_tokens_decoder")
    if listed is None:
        older = _read_json(directory / "added_tokens.json")
        listed = {token_id: {"content": token, "special": False} for token, token_id in older.items()}
    try:
        added = {int(token_id): dict(entry) for token_id, entry in dict(listed).items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: added_tokens_decoder must be an object of ids to tokens") from error
    if not all(isinstance(entry.get("content"), str) and entry["content"] for entry in added.values()):
        raise CheckpointError(f"{directory}: a token of added_tokens_decoder has no content")
    return added


def _add(backend: "Tokenizer", added: Mapping[int, Mapping[str, Any]]) -> None:
    """Adds tokens under the ids that they must have; the library numbers them on, so gaps are filled."""
    from tokenizers import AddedToken

    num_tokens = backend.get_vocab_size(with_added_tokens=False)
    if added and max(added) >= num_tokens + _MAX_ADDED:
        raise CheckpointError(f"an added token has the id {max(added)}, far beyond the {num_tokens} of the vocabulary")
    for token_id in (*sorted(i for i in added if i < num_tokens), *range(num_tokens, max(added, default=-1) + 1)):
        entry = added.get(token_id, {"content": f"<|reserved_token_{token_id}|>", "special": True})
        token = AddedToken(
            entry["content"],
            lstrip=bool(entry.get("lstrip", False)),
            rstrip=bool(entry.get("rstrip", False)),
            single_word=bool(entry.get("single_word", False)),
            normalized=False,
        )
        (backend.add_special_tokens if entry.get("special", False) else backend.add_tokens)([token])
        found = backend.token_to_id(entry["content"])
        if found != token_id:
            raise CheckpointError(f"the added token {entry['content']!r} must have the id {token_id}, but has {found}")


def _token_name(config: Mapping[str, Any], key: str) -> str | None:
    value = config.get(key)
    if isinstance(value, Mapping):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"tokenizer_config.json: {key} must be a token, got {value!r:.100}")
    return value


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, Sequence) and not isinstance(found, str):
        return {entry["name"]: entry["template"] for entry in found}
    return found


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no such file."""
    if not file.is_file():
        return {}
    value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return value
