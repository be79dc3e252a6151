"""security.md's table of bad input at the command line, as far as a model directory goes: one line, status 1 or 2.

An architecture that nobody has is refused in test_fallback.py, which has paid for transformers' own table of them.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fairlead import demo
from fairlead.testing.tiny_model import write_tiny_llama
from fairlead_server import cli

Change = Callable[[Path], object]


def settings(**changes: Any) -> Change:
    """Changes keys of config.json; None takes one away."""

    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(config))

    return change


def weights(edit: Callable[[dict[str, Any], list[str]], object]) -> Change:
    """Changes the header of the weights, given it and the names of its tensors in order."""

    def change(directory: Path) -> None:
        file = directory / "model.safetensors"
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        edit(header, [name for name in header if name != "__metadata__"])
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return change


def content(edit: Callable[[bytes], bytes]) -> Change:
    def change(directory: Path) -> None:
        file = directory / "model.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return change


def overlap(header: dict[str, Any], names: list[str]) -> None:
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def rename(header: dict[str, Any], names: list[str]) -> None:
    header["extra.weight"] = header.pop(names[0])


def reshape(header: dict[str, Any], names: list[str]) -> None:
    header[names[0]]["shape"] = header[names[0]]["shape"][::-1]


def index(directory: Path) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-2.safetensors"}}))


def no_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


ROWS: dict[str, tuple[Change, str]] = {
    "missing path": (shutil.rmtree, "no model directory"),
    "no config.json": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "invalid config.json": (lambda d: (d / "config.json").write_text("{"), "config.json is not valid JSON"),
    "no architectures": (settings(architectures=None), 'add "architectures"'),
    "unsupported dtype": (settings(dtype="int3"), "dtype 'int3' is none of float32, bfloat16, float16"),
    "unsupported quantisation": (settings(quantization_config={"quant_method": "awq"}), "--quantization int8 or int4"),
    "truncated safetensors": (content(lambda data: data[: len(data) // 2]), "is truncated: tensor '"),
    "header > file": (content(lambda data: struct.pack("<Q", 10**9) + data[8:]), "header of 1000000000"),
    "header of 2^63": (content(lambda data: struct.pack("<Q", 2**63) + data[8:]), "is no whole safetensors file"),
    "overlapping offsets": (weights(overlap), "starts at byte 0 of the data, not"),
    "missing shard": (index, "names 'model-2.safetensors', which is not in its directory"),
    "missing tensor": (weights(rename), " is missing"),
    "mis-shaped tensor": (weights(reshape), "but config.json asks for"),
    "tokenizer missing": (no_tokenizer, "give another directory with --tokenizer"),
    "only .bin": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
        "pytorch_model.bin is not read (pickle can run code), convert it",
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_a_bad_model_directory_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, row: str) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    write_tiny_llama(directory, vocab_size=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path() / name, directory / name)
    change, expected = ROWS[row]
    change(directory)
    with pytest.raises(SystemExit) as raised:
        cli.main(["run", str(directory), "hi", "--max-tokens", "1"])
    out, err = capsys.readouterr()
    assert raised.value.code == (2 if row == "unsupported quantisation" else 1)
    assert (out, err.count("\n")) == ("", 1), err
    assert err.startswith("error: ")
    assert expected in err


CANARY = "raise SystemExit('the canary was imported')\n"


def test_code_beside_a_checkpoint_is_never_imported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Flags inside config.json are no permission, whatever the command line says."""
    write_tiny_llama(tmp_path, vocab_size=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.path() / name, tmp_path / name)
    auto_map = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "canary.Canary")
    settings(auto_map=auto_map, trust_remote_code=True, text_config={"auto_map": auto_map})(tmp_path)
    (tmp_path / "canary.py").write_text(CANARY)
    with pytest.raises(SystemExit) as raised:
        cli.main(["run", str(tmp_path), "hi", "--max-tokens", "1", "--trust-remote-code"])
    assert raised.value.code == 0, capsys.readouterr().err
