"""A model directory on disk: finding it, reading its JSON files and the headers of its safetensors files. No torch.

Everything that can be wrong with the files is found here, before any memory is allocated.
Source of the format: https://github.com/huggingface/safetensors, README, "Format".
"""

import errno
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fairlead.config import ModelConfig
from fairlead.errors import CheckpointError, ModelNotFoundError

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 8
_PATTERNS = ("*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja", "*.tiktoken")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a safetensors file: its dtype as the file spells it ("BF16") and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """What it takes in the file."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened model directory; `config` and `generation_config` are its JSON files as they stand."""

    directory: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]

    @classmethod
    def open(cls, config: ModelConfig) -> "Checkpoint":
        """Finds the directory (downloading a Hugging Face id) and reads its JSON files.

        Raises ModelNotFoundError or CheckpointError with one line that says what is missing.
        """
        directory = _directory(config)
        path = directory / "config.json"
        if not path.is_file():
            raise ModelNotFoundError(
                f"{directory} has no config.json; it must be a model directory in Hugging Face format"
            )
        generation = directory / "generation_config.json"
        return cls(
            directory=directory,
            config=_read_json(path),
            generation_config=_read_json(generation) if generation.is_file() else {},
        )

    @property
    def architecture(self) -> str:
        """The model class that config.json names."""
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(
                f'{self.directory / "config.json"} names no model class; add "architectures": ["..."]'
            )
        return names[0]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids of generation_config.json, else of config.json."""
        for source in (self.generation_config, self.config):
            ids = source.get("eos_token_id")
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if not all(type(i) is int for i in ids):
                    raise CheckpointError(f"{self.directory}: eos_token_id must be an integer or a list of integers")
                return tuple(ids)
        return ()

    def sampling_defaults(self) -> dict[str, Any]:
        """The SamplingParams that generation_config.json sets; greedy where it says do_sample: false."""
        given = self.generation_config
        is_greedy = given.get("do_sample") is False
        names = ["repetition_penalty", *(() if is_greedy else ("temperature", "top_k", "top_p", "min_p"))]
        found = {name: given[name] for name in names if given.get(name) is not None}
        if given.get("max_new_tokens") is not None:
            found["max_tokens"] = given["max_new_tokens"]
        return {**found, "temperature": 0.0} if is_greedy else found

    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name, from the headers alone. Raises on a missing, truncated or inconsistent file."""
        tensors: dict[str, StoredTensor] = {}
        for file in self._weight_files():
            for name, tensor in read_header(file):
                if name in tensors:
                    raise CheckpointError(f"tensor {name!r} stands in both {tensors[name].file.name} and {file.name}")
                tensors[name] = tensor
        return tensors

    def _weight_files(self) -> list[Path]:
        index = self.directory / "model.safetensors.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
                raise CheckpointError(f"{index} has no weight_map of tensor names to files")
            files = [self.directory / name for name in sorted(set(weight_map.values()))]
            for file in files:
                if file.parent != self.directory or not _is_file(file):
                    raise ModelNotFoundError(f"{index} names {file.name!r:.200}, which is not in its directory")
            return files
        files = sorted(self.directory.glob("*.safetensors"))
        if not files:
            other = next((f.name for p in ("*.bin", "*.pt", "*.pth", "*.gguf") for f in self.directory.glob(p)), None)
            found = f"; {other} is not read (pickle can run code), convert it with save_pretrained" if other else ""
            raise ModelNotFoundError(f"{self.directory} holds no *.safetensors file{found}")
        return files


def _directory(config: ModelConfig) -> Path:
    if config.model == "demo":
        from fairlead import demo

        return demo.path()
    path = Path(config.model).expanduser()
    if path.is_dir():
        return path.resolve()
    looks_local = path.is_absolute() or config.model.startswith((".", "~")) or config.model.count("/") != 1
    if looks_local or path.exists():
        raise ModelNotFoundError(
            f"there is no model directory {config.model!r}; give a directory, a Hugging Face id (org/name) or 'demo'"
        )
    return download(config)


def download(config: ModelConfig) -> Path:
    """Brings a Hugging Face id into the cache, as far as it is not there; returns its directory.

    Raises ModelNotFoundError.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                config.model,
                revision=config.revision,
                cache_dir=config.download_dir,
                allow_patterns=list(_PATTERNS),
            )
        )
    except Exception as error:  # the hub raises many types (HTTP, offline, missing, gated); each is a missing model
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.ENOSPC):
            reason += "; choose another place with --download-dir"
        raise ModelNotFoundError(f"{config.model!r} is no directory here, and the download failed: {reason}") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of one safetensors file, checked: dtype, shape and extent of each, no overlap, nothing cut off."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is no whole safetensors file: {size} bytes, header of {length}")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a broken safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a broken safetensors header: not a JSON object")
    header.pop("__metadata__", None)
    expected_start = 0
    data_bytes = size - 8 - length
    for name, entry, start, end in sorted(_extents(file, header), key=lambda e: (e[2], e[3])):
        if end > data_bytes:
            raise CheckpointError(
                f"{file} is truncated: tensor {name!r:.200} ends at byte {8 + length + end} of {size}; "
                "download it again"
            )
        if start != expected_start:
            raise CheckpointError(
                f"{file}: tensor {name!r:.200} starts at byte {start} of the data, not {expected_start}"
            )
        expected_start = end
        yield name, StoredTensor(file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]))
    if expected_start != data_bytes:
        raise CheckpointError(f"{file} has {data_bytes - expected_start} bytes that belong to no tensor")


def _extents(file: Path, header: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    for name, entry in header.items():
        try:
            dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            item_bytes = _ITEM_BYTES[dtype]
            is_whole = len(shape) <= _MAX_DIMS and all(type(n) is int and 0 <= n < 2**63 for n in [*shape, start, end])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: tensor {name!r:.200} has a broken header entry") from error
        if not is_whole:
            raise CheckpointError(f"{file}: tensor {name!r:.200} has a broken shape or extent")
        num_bytes = math.prod(shape) * item_bytes
        if end - start != num_bytes:
            raise CheckpointError(
                f"{file}: tensor {name!r:.200} of {dtype} {shape} takes {num_bytes} bytes, not {start} to {end}"
            )
        yield name, entry, start, end
