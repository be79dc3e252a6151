"""Which engines there are, and where they and their models lie below one folder."""

import sys
from pathlib import Path
from typing import Any

ENGINES = (
    "fairlead",
    "fairlead-int8",
    "fairlead-int4",
    "transformers",
    "vllm",
    "vllm-int8",
    "openvino",
    "openvino-int8",
    "openvino-int4",
    "llamacpp",
    "llamacpp-q8_0",
    "llamacpp-q4_0",
)
"""Without a format, weights are 16 bits wide: bfloat16, OpenVINO's float16."""

_OWN_ENVIRONMENT = {"vllm": "venv-vllm", "openvino": "venv-ov"}


def how(engine: str, home: Path, model: str) -> tuple[str, str, dict[str, Any]]:
    """The interpreter, the adapter's name and its `comparing.adapters.Options` for an engine of ENGINES."""
    name, _, variant = engine.partition("-")
    directory = home / "models" / model
    options: dict[str, Any] = {"directory": str(directory)}
    if name == "fairlead":
        options["quantization"] = variant or None
    if name == "vllm" and variant:
        options["directory"] = f"{directory}-w8a8"
    if name == "llamacpp":
        options["server"] = str(home / "llama-build" / "bin" / "llama-server")
        options["file"] = str(home / "gguf" / f"{model}-{variant or 'bf16'}.gguf")
    if name == "openvino":
        options["file"] = str(home / "ov" / f"{model}-{variant or 'fp16'}")
    own = _OWN_ENVIRONMENT.get(name)
    python = sys.executable if own is None else str(home / own / "bin" / "python")
    return python, name, options


def present(home: Path, model: str) -> list[str]:
    """Those whose program and model are there."""

    def is_there(engine: str) -> bool:
        python, _, options = how(engine, home, model)
        paths = [python, *(options[key] for key in ("directory", "server", "file") if key in options)]
        return all(Path(path).exists() for path in paths)

    return [engine for engine in ENGINES if is_there(engine)]
