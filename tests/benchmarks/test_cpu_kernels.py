"""The benchmarks of the CPU's kernels run, and each line ends with a share of a ceiling that was measured."""

import re
import sys
from collections.abc import Iterator

import pytest
import torch

import cpu_attention
import cpu_elementwise
import cpu_kernels
from fairlead_cpu import native
from fairlead_cpu.native_ops import native_providers

pytestmark = pytest.mark.skipif(native.kernels() is None, reason="fairlead-cpu was built without kernels")


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """The scripts set them, each for its own process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()[1:]


def test_matmuls(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: bool) -> None:
    models = ",".join(cpu_kernels.MODELS) if full else "smol135m"
    arguments = ["--models", models, "--layers", "o", "--rows", "1,8", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["cpu_kernels.py", *arguments])
    with torch.inference_mode():
        cpu_kernels.main()
    found = lines(capsys)
    assert len(found) == 2 * 4 * len(models.split(","))
    assert all(re.search(r" \d+ % of the limit", line) for line in found)


def test_elementwise_ops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: bool) -> None:
    models = ",".join(cpu_elementwise.MODELS) if full else "smol135m"
    monkeypatch.setattr(sys, "argv", ["cpu_elementwise.py", "--models", models, "--rows", "1,7", "--rounds", "1"])
    with torch.inference_mode():
        cpu_elementwise.main()
    found = lines(capsys)
    assert len(found) == 2 * 7 * len(models.split(","))
    assert all(re.search(r"\d+% of a copy$", line) for line in found)


def test_every_native_op_is_measured() -> None:
    kernels = native.kernels()
    assert kernels is not None
    measured = cpu_elementwise.works(cpu_elementwise.NativeOps(kernels), cpu_elementwise.MODELS["smol135m"], 2)
    assert {*measured, "gemma_rms_norm"} == set(native_providers(kernels))  # rms_norm with a 1 more
    for run, num_bytes in measured.values():
        assert run() is not None
        assert num_bytes > 0


def test_attention(capsys: pytest.CaptureFixture[str]) -> None:
    kernels = native.kernels()
    assert kernels is not None
    workload = cpu_attention.Workload(name="decode", num_seqs=2, num_new=1, context=20)
    cpu_attention.measure(workload, "smol135m", "bfloat16", 1, kernels)
    _, *found = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in found] == ["native", "sdpa"]
    assert all(line.count("% of it)") == 2 for line in found)
