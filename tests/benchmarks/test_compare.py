"""benchmarks/compare.py: the workloads are as specified, engines take turns, ratios point the right way."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import compare
from comparing import adapters, engines, targets, workloads

SCRIPT = Path(compare.__file__)


@pytest.mark.parametrize(
    ("workload", "num_requests", "num_in", "num_out"),
    [("w1", 64, 8068, 4288), ("w2", 1, 128, 128), ("w3", 1, 2048, 1), ("w4", 32, 32 * 1056, 32 * 32)],
)
def test_the_workloads(workload: str, num_requests: int, num_in: int, num_out: int) -> None:
    asked = workloads.requests(workload, "smol135m", 0)
    assert asked == workloads.requests(workload, "smol135m", 0)
    found = len(asked), sum(len(prompt) for prompt, _ in asked), sum(num for _, num in asked)
    assert found == (num_requests, num_in, num_out)
    again = workloads.requests(workload, "smol135m", 1)
    assert all(one[0] != other[0] for one, other in zip(asked, again, strict=True))
    assert [(len(prompt), num) for prompt, num in again] == [(len(prompt), num) for prompt, num in asked]
    if workload == "w4":
        assert len({tuple(prompt[:1024]) for prompt, _ in asked}) == 1
        assert len({tuple(prompt) for prompt, _ in asked}) == 32


def test_metrics() -> None:
    asked = [([1] * 10, 5), ([1] * 20, 5)]
    assert workloads.metrics("w1", asked, 2.0, []) == {"output_tokens_per_s": 5.0}
    assert workloads.metrics("w3", asked, 2.0, []) == {"prefill_tokens_per_s": 15.0}
    assert workloads.metrics("w4", asked, 2.0, []) == {"wall_s": 2.0}
    found = workloads.metrics("w2", asked[:1], 0.0, [0.25, 0.5, 0.75])
    assert found == {"ttft_ms": 250.0, "itl_ms": 250.0}


def test_a_target_is_reached_by_the_ratio_to_the_best_of_the_others() -> None:
    assert targets.ratio("w4 wall_s", 2.0, [3.0, 4.0]) == 1.5
    assert targets.ratio("w1 output_tokens_per_s", 2.0, [4.0, 1.0]) == 0.5
    w1, w2 = targets.W1, targets.W2
    medians = {"fairlead": {w1: 130.0, w2: 10.0}, "vllm": {w1: 100.0, w2: 17.0}, "limit": {w2: 5.0}}
    lines = targets.table("smol135m", medians)
    assert lines[2:] == [
        f"| {w1} | fairlead | vllm | 1.30 x | 1.30 x | yes |",
        f"| {w2} | fairlead | limit | 0.87 x | 0.50 x | no |",
        f"| {w2} | fairlead | vllm | 1.80 x | 1.70 x | no |",
    ]
    assert targets.table("smol135m", {"fairlead": {w1: 1.0}}) == []


def test_only_engines_with_program_and_model_are_taken(tmp_path: Path) -> None:
    assert engines.present(tmp_path, "tiny") == []
    for path in ("models/tiny", "venv-vllm/bin/python", "llama-build/bin/llama-server", "gguf/tiny-q4_0.gguf"):
        (tmp_path / path).mkdir(parents=True)
    own = ["fairlead", "fairlead-int8", "fairlead-int4", "transformers"]
    assert engines.present(tmp_path, "tiny") == [*own, "vllm", "llamacpp-q4_0"]


def test_an_output_of_another_length_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="outputs have"):
        adapters.check([5, 4], [([1], 5), ([1], 5)])


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[adapters.LlamaCpp]:
    server = tmp_path / "llama-server"
    server.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parent / "fake_llama_server.py"} "$@"\n')
    server.chmod(0o755)
    made = adapters.LlamaCpp(adapters.Options(directory="", server=str(server), file="model.gguf"))
    yield made
    made._process.kill()
    made._process.wait()


def test_llama_cpp_is_asked_over_http(llama: adapters.LlamaCpp) -> None:
    llama.generate([([1, 2], 3), ([4], 5)])
    times = llama.stream(([1, 2], 4))
    assert len(times) == 4
    assert times == sorted(times)


def test_llama_cpp_that_stops_early_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("FAKE_MISSING", "1")
    llama = request.getfixturevalue("llama")
    with pytest.raises(RuntimeError, match="were asked for"):
        llama.generate([([1, 2], 3)])


def test_a_dry_run_writes_table_and_plots(tmp_path: Path, full: bool) -> None:
    """An engine that cannot be loaded is told, and the others are measured."""
    asked = "fairlead,transformers,llamacpp" if full else "fairlead,llamacpp"
    sizes = ["--model", "tiny", "--repeats", "1", "--home", str(tmp_path), "--engines", asked]
    command = [sys.executable, str(SCRIPT), *sizes, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1, done.stderr
    data = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert list(data["errors"]) == ["llamacpp"]
    expected = {f"{workload} {metric}" for workload, metrics in workloads.METRICS.items() for metric in metrics}
    for engine in set(asked.split(",")) - {"llamacpp"}:
        assert set(data["runs"][engine]) == expected
        assert all(len(v) == 1 and v[0] > 0 for v in data["runs"][engine].values())
    table = (tmp_path / "compare.md").read_text(encoding="utf-8")
    assert "* llamacpp failed: FileNotFoundError" in table
    assert "its figures mean nothing" in table
    assert len(list(tmp_path.glob("*.svg")) + list(tmp_path.glob("*.png"))) == len(expected)
