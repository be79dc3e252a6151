"""Checkpoints on disk, whole and broken: each fault is one error that names the file, and the tensor if it has one."""

import errno
import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairlead.checkpoint import Checkpoint, StoredTensor, read_header
from fairlead.config import ModelConfig
from fairlead.errors import CheckpointError, ModelError, ModelNotFoundError
from fairlead.testing.tiny_model import write_tiny_llama


def open_checkpoint(directory: Path | str) -> Checkpoint:
    return Checkpoint.open(ModelConfig(model=str(directory)))


def write_safetensors(file: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file of any header: an object for JSON, or bytes as they are."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return file


def entry(start: int, end: int, shape: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "model")


def edit_json(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**values, **changes}.items() if v is not ...}))


def test_a_whole_directory_is_read(model: Path) -> None:
    checkpoint = open_checkpoint(model)
    assert checkpoint.directory == model
    assert checkpoint.architecture == "LlamaForCausalLM"
    assert checkpoint.generation_config == {}
    tensors = checkpoint.tensors()
    assert tensors["model.norm.weight"] == StoredTensor(file=model / "model.safetensors", dtype="F32", shape=(64,))
    assert len(tensors) == 3 + 2 * 9


def test_headers_agree_with_safetensors(model: Path) -> None:
    from safetensors import safe_open

    found = dict(read_header(model / "model.safetensors"))
    with safe_open(model / "model.safetensors", framework="np") as reader:
        assert set(found) == set(reader.keys())
        for name, tensor in found.items():
            assert tuple(reader.get_slice(name).get_shape()) == tensor.shape
            assert reader.get_slice(name).get_dtype() == tensor.dtype


@pytest.mark.parametrize("model", ["no/such/dir", "./missing", "/no/such/dir", "~/no-such-dir", "gpt2-but-local"])
def test_a_missing_path(model: str) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        open_checkpoint(model)
    assert model in one_line(error)


def test_a_file_is_no_model_directory(model: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no model directory"):
        open_checkpoint(model / "config.json")


def test_a_hub_id_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="'acme/no-such-model' is no directory here") as error:
        open_checkpoint("acme/no-such-model")
    one_line(error)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise OSError(number, os.strerror(number), "/cache/models--acme")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ModelNotFoundError, match=r"'/cache/models--acme'; choose another place with --download-dir"):
        open_checkpoint("acme/model")


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        open_checkpoint(model)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_json_file_that_holds_no_object(model: Path, name: str, text: bytes) -> None:
    (model / name).write_bytes(text)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(model)
    assert name in one_line(error)


@pytest.mark.parametrize("value", [..., None, [], "LlamaForCausalLM", [3], {}])
def test_no_architecture(model: Path, value: object) -> None:
    edit_json(model / "config.json", architectures=value)
    with pytest.raises(CheckpointError, match="names no model class"):
        _ = open_checkpoint(model).architecture


@pytest.mark.parametrize(
    ("in_generation", "in_config", "expected"),
    [(None, None, ()), (None, 7, (7,)), (5, 7, (5,)), ([5, 6], 7, (5, 6)), (..., [2], (2,)), (..., ..., ())],
)
def test_end_of_sequence_ids(model: Path, in_generation: object, in_config: object, expected: tuple[int, ...]) -> None:
    edit_json(model / "config.json", eos_token_id=in_config)
    (model / "generation_config.json").write_text("{}")
    edit_json(model / "generation_config.json", eos_token_id=in_generation)
    assert open_checkpoint(model).eos_token_ids == expected


@pytest.mark.parametrize("value", ["2", 2.5, [2, "3"], {}, True])
def test_bad_end_of_sequence_ids(model: Path, value: object) -> None:
    edit_json(model / "config.json", eos_token_id=value)
    with pytest.raises(CheckpointError, match="eos_token_id"):
        _ = open_checkpoint(model).eos_token_ids


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "max_length": 7, "top_k": None}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": True, "top_k": 20, "min_p": 0.1}, {"top_k": 20, "min_p": 0.1}),
        ({"max_new_tokens": 40, "do_sample": False}, {"max_tokens": 40, "temperature": 0.0}),
        ({"max_new_tokens": None}, {}),
    ],
)
def test_sampling_defaults(model: Path, given: dict[str, Any], expected: dict[str, Any]) -> None:
    (model / "generation_config.json").write_text(json.dumps(given))
    assert open_checkpoint(model).sampling_defaults() == expected


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.gguf"])
def test_only_files_that_are_not_read(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    with pytest.raises(ModelNotFoundError, match="convert it with save_pretrained") as error:
        open_checkpoint(model).tensors()
    assert name in one_line(error)


def test_no_weights_at_all(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match=r"holds no \*\.safetensors file$"):
        open_checkpoint(model).tensors()


def test_a_tensor_in_two_files(model: Path) -> None:
    write_safetensors(model / "other.safetensors", {"model.norm.weight": entry(0, 4, [1])}, b"0000")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' stands in both model\.safetensors and other"):
        open_checkpoint(model).tensors()


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "missing.safetensors"},
        {"a": "../model.safetensors"},
        {"a": "../../../../etc/passwd"},
        {"a": "/etc/passwd"},
        {"a": "sub/model.safetensors"},
        {"a": ""},
        {"a": "."},
        {"a": ".."},
        {"a": "nul\0.safetensors"},
        {"a": "new\nline"},
        {"a": "x" * 5000},
    ],
    ids=lambda m: repr(m["a"])[:30],
)
def test_an_index_that_names_no_file_of_the_directory(model: Path, weight_map: dict[str, str]) -> None:
    (model.parent / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "sub").mkdir()
    (model / "sub" / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelNotFoundError, match="not in its directory") as error:
        open_checkpoint(model).tensors()
    assert "model.safetensors.index.json" in one_line(error)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}], ids=str)
def test_an_index_without_a_weight_map(model: Path, index: dict[str, Any]) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        open_checkpoint(model).tensors()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, -1])
def test_a_truncated_file(model: Path, size: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(model).tensors()
    assert str(file) in one_line(error)
    if size == -1:
        assert "is truncated: tensor '" in str(error.value)


HUGE = 10**4000
BROKEN_HEADERS: list[tuple[str, object, bytes]] = [
    ("no JSON", b"{", b""),
    ("no UTF-8", b'{"\xff": 1}', b""),
    ("deep", b"[" * 100_000, b""),
    ("no object", [1], b""),
    ("entry is a number", {"t": 1}, b""),
    ("entry is a list", {"t": []}, b""),
    ("no dtype", {"t": {"shape": [1], "data_offsets": [0, 4]}}, b"0000"),
    ("unknown dtype", {"t": entry(0, 4, [1], "F31")}, b"0000"),
    ("dtype is a list", {"t": entry(0, 4, [1], ["F32"])}, b"0000"),
    ("three offsets", {"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"0000"),
    ("negative shape", {"t": entry(0, 4, [-1])}, b"0000"),
    ("two negatives", {"t": entry(0, 4, [-1, -1])}, b"0000"),
    ("fractional shape", {"t": entry(0, 4, [1.0])}, b"0000"),
    ("true as a size", {"t": entry(0, 4, [True])}, b"0000"),
    ("shape is a word", {"t": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 4]}}, b"0000"),
    ("shape is a number", {"t": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"0000"),
    ("shape would be a long word", {"t": entry(0, 4, [10**10, "ab"])}, b"0000"),
    ("shape holds a list", {"t": entry(0, 4, [10**10, [1]])}, b"0000"),
    ("huge shape", {"t": entry(0, 4, [2**62, 2**62])}, b"0000"),
    ("shape beyond any integer", {"t": entry(0, 4, [HUGE, HUGE])}, b"0000"),
    ("shape of many ones", {"t": entry(0, 4, [1] * 10_000)}, b"0000"),
    ("negative start", {"t": entry(-4, 0, [1])}, b"0000"),
    ("end before start", {"t": entry(4, 0, [1])}, b"0000"),
    ("extent beyond shape", {"t": entry(0, 8, [1])}, b"00000000"),
    ("past the end", {"t": entry(0, 4, [1])}, b"000"),
    ("far past the end", {"t": entry(2**60, 2**60 + 4, [1])}, b"0000"),
    ("overlap", {"s": entry(0, 8, [2]), "t": entry(4, 12, [2])}, b"0" * 12),
    ("the same place", {"s": entry(0, 4, [1]), "t": entry(0, 4, [1])}, b"0000"),
    ("a gap", {"s": entry(0, 4, [1]), "t": entry(8, 12, [1])}, b"0" * 12),
    ("a gap at the start", {"t": entry(4, 8, [1])}, b"0" * 8),
    ("bytes of no tensor", {"t": entry(0, 4, [1])}, b"0" * 5),
]


@pytest.mark.parametrize(("header", "data"), [c[1:] for c in BROKEN_HEADERS], ids=[c[0] for c in BROKEN_HEADERS])
def test_a_broken_header(tmp_path: Path, header: object, data: bytes) -> None:
    file = write_safetensors(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as error:
        list(read_header(file))
    message = one_line(error)
    assert str(file) in message
    names_tensor = isinstance(header, dict) and "'t'" in message
    assert names_tensor or not isinstance(header, dict) or "no tensor" in message


@pytest.mark.parametrize("length", [9, 2**31, 2**63, 2**64 - 1])
def test_a_header_longer_than_its_file(tmp_path: Path, length: int) -> None:
    file = write_safetensors(tmp_path / "model.safetensors", b"{}", length=length)
    with pytest.raises(CheckpointError, match="no whole safetensors file"):
        list(read_header(file))


def test_a_directory_in_place_of_a_weights_file(model: Path) -> None:
    (model / "other.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"other\.safetensors cannot be read"):
        open_checkpoint(model).tensors()


def test_headers_that_are_right(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(0, 4, [1]),
        "empty": entry(4, 4, [3, 0]),
        "scalar": entry(4, 6, [], "BF16"),
        "a": entry(6, 16, [5, 1], "F16"),
    }
    file = write_safetensors(tmp_path / "x.safetensors", header, b"0" * 16)
    assert {name: t.shape for name, t in read_header(file)} == {"b": (1,), "empty": (3, 0), "scalar": (), "a": (5, 1)}
    assert list(read_header(write_safetensors(file, b"{}   "))) == []


def mutate(rng: random.Random, value: Any) -> Any:
    """The value with something in it exchanged for something else."""
    odd = [None, True, -1, 0, 1, 2**31, 2**63, 1e308, HUGE, "", "F32", "t", [], {}, [[]], [0, 4], "\ud800"]
    if rng.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(odd)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    changed = value.copy()
    if rng.random() < 0.2:
        del changed[key]
    else:
        changed[key] = mutate(rng, value[key])
    return changed


def test_fuzzed_headers_give_typed_errors_and_take_no_memory(model: Path, count: Callable[..., int]) -> None:
    rng = random.Random(0)
    good = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    small = {name: header[name] for name in list(header)[:6]}
    messages: list[str] = []
    tracemalloc.start()
    try:
        for i in range(count(600, full=50_000)):
            file = model / "model.safetensors"
            if i % 3 == 0:
                write_safetensors(file, mutate(rng, header if i % 2 else small), data)
            elif i % 3 == 1:
                raw = bytearray(good[: 8 + length])
                for _ in range(rng.randint(1, 8)):
                    raw[rng.randrange(len(raw))] = rng.randrange(256)
                file.write_bytes(bytes(raw) + data)
            else:
                size = rng.randrange(200)
                file.write_bytes(rng.randrange(300).to_bytes(8, "little") + rng.randbytes(size))
            try:
                open_checkpoint(model).tensors()
            except ModelError as error:
                messages.append(str(error))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(messages) > 100
    assert not any("\n" in message for message in messages)
    assert peak < 64 * 2**20
