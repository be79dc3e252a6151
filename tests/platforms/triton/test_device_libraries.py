"""What torch was built for, without importing it; which devices a variable leaves."""

from pathlib import Path

import pytest

from fairlead_triton.device import libraries
from fairlead_triton.device.libraries import TorchBuild, installed_torch, installed_version, numbers, read_torch
from fairlead_triton.device.visible import visible

VERSION_FILE = """from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip', 'xpu']
__version__ = '2.13.0+{local}'
debug = False
cuda: Optional[str] = {cuda}
git_version = 'abc'
hip: Optional[str] = {hip}
xpu: Optional[str] = {xpu}
"""


@pytest.mark.parametrize(
    ("local", "values", "kind"),
    [
        ("cpu", {}, "a CPU build"),
        ("cu130", {"cuda": "'13.0'"}, "a CUDA 13.0 build"),
        ("rocm7.1", {"hip": "'7.1.2'"}, "a ROCm 7.1.2 build"),
        ("xpu", {"xpu": "'20250302'"}, "an XPU 20250302 build"),
    ],
)
def test_torch_tells_what_it_was_built_for(tmp_path: Path, local: str, values: dict[str, str], kind: str) -> None:
    file = tmp_path / "version.py"
    file.write_text(VERSION_FILE.format(**{"local": local, "cuda": None, "hip": None, "xpu": None, **values}))
    build = read_torch(file, "2.13.0")
    assert (build.version, build.kind) == (f"2.13.0+{local}", kind)


def test_the_torch_that_is_here() -> None:
    import torch

    build = installed_torch()
    found = (torch.__version__, torch.version.cuda, torch.version.hip, torch.version.xpu)
    assert build == TorchBuild(version=found[0], cuda=found[1], hip=found[2], xpu=found[3])
    assert installed_version("fairlead-triton") == "0.1.0"
    assert installed_version("no-such-distribution") is None


def test_a_torch_without_its_file_has_its_version(tmp_path: Path) -> None:
    assert read_torch(tmp_path / "none", "2.13.0+cpu") == TorchBuild(version="2.13.0+cpu")


def test_numbers_of_versions() -> None:
    assert [numbers(text) for text in ("535.104-rc1", "2.8.10+xpu", "abc")] == [(535, 104), (2, 8, 10), ()]
    assert libraries.wrong_torch(TorchBuild(version="2", hip="7"), "ROCm") is None


def test_entries_end_at_the_first_that_names_none() -> None:
    devices = ["GPU-ab1", "GPU-ab2", "GPU-c"]
    for entries, found, stopped_at in (
        (None, devices, None),
        (["2", "0"], ["GPU-c", "GPU-ab1"], None),
        (["GPU-c", "GPU-ab2"], ["GPU-c", "GPU-ab2"], None),
        (["0", "GPU-ab", "1"], ["GPU-ab1"], "GPU-ab"),  # two bear that beginning
        (["1", "-1", "0"], ["GPU-ab2"], "-1"),
        ([""], [], ""),
    ):
        assert visible(entries, devices, str) == (found, stopped_at)
