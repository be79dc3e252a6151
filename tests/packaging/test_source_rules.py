"""What must not stand in the source: vendors in the core, ways to run foreign bytes, overlong files."""

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEUTRAL_FOLDERS = ("core", "server")
SOURCE_FOLDERS = ("core", "server", "platforms", "examples", "benchmarks", "docs", "tests")
TEXT_SUFFIXES = (".py", ".pyi", ".html", ".js", ".css", ".jinja", ".toml", ".yaml", ".sh")
MAX_LINES = 500

# Found anywhere, inside longer names too; the short ones only as words, because of "ownership" and "timestamps".
VENDOR_NAMES = r"cuda|rocm|nvidia|cudnn|cublas|nccl|habana|gaudi|sycl|triton|cann\b"
VENDOR_WORDS = r"xpu|hip|amd|intel|mps|npu|hpu|tpu|mlu"
VENDOR = re.compile(rf"{VENDOR_NAMES}|(?<![a-z0-9])(?:{VENDOR_WORDS})(?![a-z])", re.IGNORECASE)

FOREIGN_CODE_MODULES = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib")


def vendor_violations(source: str) -> list[str]:
    """Vendors and their device APIs, comments and docstrings included."""
    lines = enumerate(source.splitlines(), start=1)
    return [f"{number}: {match.group()!r}" for number, line in lines for match in VENDOR.finditer(line)]


def device_branches(source: str) -> list[str]:
    """Comparisons of something called a device (or its type) with a fixed text."""

    def is_device(node: ast.expr) -> bool:
        if isinstance(node, ast.Attribute) and node.attr == "type":
            node = node.value
        return getattr(node, "attr", getattr(node, "id", "")).endswith(("device", "device_type", "platform_name"))

    def is_text(node: ast.expr) -> bool:
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            return any(is_text(element) for element in node.elts)
        return isinstance(node, ast.Constant) and isinstance(node.value, str)

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(map(is_device, sides)) and any(map(is_text, sides)):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def foreign_code_violations(source: str) -> list[str]:
    """Imports and calls that run, or may run, what a file or a message holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id + "()"]
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            names = [] if isinstance(node.value, ast.Constant) and node.value.value is False else ["allow_pickle"]
        for name in names:
            forbidden = name in ("torch.load", "eval()", "exec()", "builtins.eval", "builtins.exec", "allow_pickle")
            if forbidden or (not isinstance(node, ast.Attribute) and name.split(".")[0] in FOREIGN_CODE_MODULES):
                found.append(f"{getattr(node, 'lineno', 0)}: {name}")
    return found


def too_long(source: str) -> list[str]:
    """The number of lines, where it exceeds MAX_LINES."""
    lines = len(source.splitlines())
    return [f"{lines} lines, at most {MAX_LINES}"] if lines > MAX_LINES else []


def check(folders: tuple[str, ...], suffixes: tuple[str, ...], rule: Callable[[str], list[str]]) -> list[str]:
    found, checked = [], 0
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in suffixes and file.is_file():
                checked += 1
                found += [f"{file.relative_to(ROOT)}:{line}" for line in rule(file.read_text(encoding="utf-8"))]
    assert checked > 10
    return found


def test_no_vendor_name_in_core_or_server() -> None:
    found = check(NEUTRAL_FOLDERS, TEXT_SUFFIXES, vendor_violations)
    assert not found, "\n".join(found)


def test_no_branch_on_a_device_in_core_or_server() -> None:
    found = check(NEUTRAL_FOLDERS, (".py",), device_branches)
    assert not found, "\n".join(found)


def test_nothing_runs_foreign_bytes() -> None:
    found = check(("core", "server", "platforms", "examples", "benchmarks"), (".py",), foreign_code_violations)
    assert not found, "\n".join(found)


def test_files_are_short() -> None:
    found = check(SOURCE_FOLDERS, (".py",), too_long)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "torch.cuda.synchronize()",
        "name = 'rocm'",
        "# works on NVIDIA only",
        "use_cuda_graph = True",
        "class CudaGraph: ...",
        "import torch.xpu",
        "if torch.backends.mps.is_available(): ...",
        "HIP_VISIBLE_DEVICES = 0",
        "import triton",
    ],
)
def test_a_vendor_name_is_found(source: str) -> None:
    assert vendor_violations(f'"""Neutral."""\n{source}') != []


def test_a_neutral_word_is_no_vendor_name() -> None:
    assert vendor_violations("relationship, ownership, timestamps, chip, input, intelligible, gpu_memory") == []


@pytest.mark.parametrize(
    "source",
    ["if device == 'cpu': ...", "x = tensor.device.type != 'meta'", "ok = self.torch_device.type in ('a', 'b')"],
)
def test_a_branch_on_a_device_is_found(source: str) -> None:
    assert len(device_branches(source)) == 1


def test_a_choice_by_configured_name_is_no_branch_on_a_device() -> None:
    assert device_branches("if device.name == config.device or kind == 'x' or device is None: ...") == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "import dill as d",
        "state = torch.load(path)",
        "from torch import load",
        "eval('1')",
        "exec(code)",
        "import builtins\nbuiltins.eval('1')",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_running_foreign_bytes_is_found(source: str) -> None:
    assert len(foreign_code_violations(source)) == 1


def test_evaluation_mode_is_harmless() -> None:
    assert foreign_code_violations("model.eval()\nnp.load(path, allow_pickle=False)\nself.pickle = 1") == []


def test_a_long_file_is_found() -> None:
    assert too_long("x = 1\n" * MAX_LINES) == []
    assert too_long("x = 1\n" * (MAX_LINES + 1)) == ["501 lines, at most 500"]
