"""benchmarks/gpu runs from end to end at tiny sizes on the CPU, goes on where it stopped, and reports what it has."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

RUN = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.py"
QUICK = {
    "ceilings": "card",
    "kernels": "attention,norms",
    "decode": "llama1b",
    "prefill": "llama8b",
    "end_to_end": "llama1b: fairlead",
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), "--platform", "cpu", "--tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, full: bool) -> Path:
    """The results of a dry run, all of it at the full count."""
    out = tmp_path_factory.mktemp("gpu") / "results"
    groups = [] if full else ["--groups", ",".join(QUICK.values()), "--steps", ",".join([*QUICK, "report"])]
    done = run("--one-process", "--out", str(out), *groups)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def cases(out: Path, step: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{step}.json").read_text(encoding="utf-8"))["cases"]
    return found


def test_no_case_fails(out: Path) -> None:
    for file in out.glob("*.json"):
        for name, case in cases(out, file.stem).items():
            assert "failed" not in case, f"{name}: {case['failed']}"
            assert case.get("passed", True), f"{name}: {case}"


def test_each_step_measures_what_its_targets_are_about(out: Path) -> None:
    assert cases(out, "ceilings")["copy"]["bytes_per_s"] > 1e6
    assert cases(out, "kernels")["decode attention 64 x 4096, D 128"]["share"] > 0
    decode = cases(out, "decode")["llama1b, 1 x 128"]
    assert decode["step_s"] > 0
    assert decode["overhead_us"] == pytest.approx((decode["step_s"] - decode["device_s"]) * 1e6)
    assert cases(out, "prefill")["llama8b, 8192"]["share"] > 0
    fairlead = cases(out, "end_to_end")["llama1b: fairlead"]
    assert fairlead["output_tokens_per_s"] == pytest.approx(fairlead["tokens"] / fairlead["seconds"])
    assert "aten::" in (out / "profiles" / "decode_llama1b_1x32.txt").read_text(encoding="utf-8")


def test_the_report_names_every_target_and_claims_nothing_of_a_dry_run(out: Path) -> None:
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text.count("| ≥ ") + text.count("| ≤ ") == 8
    assert "| dry run |" in text
    assert "| met |" not in text
    assert "its figures mean nothing" in text
    for plot in out.glob("*.svg"):
        assert ElementTree.parse(plot).getroot().tag.endswith("svg")
        assert plot.name in text


def test_it_goes_on_where_it_stopped(out: Path, tmp_path: Path, full: bool) -> None:
    """In a process for each group, as on a card: the case that is missing is measured, the others are kept."""
    if not full:
        pytest.skip("starts two more processes; make test-full runs it")
    kept = json.loads((out / "ceilings.json").read_text(encoding="utf-8"))
    lost = kept["cases"].pop("copy")
    (tmp_path / "ceilings.json").write_text(json.dumps(kept), encoding="utf-8")
    done = run("--steps", "ceilings", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    now = cases(tmp_path, "ceilings")
    assert {name: now[name] for name in kept["cases"]} == kept["cases"]
    assert now["copy"] != lost
    other = run("--steps", "ceilings", "--out", str(tmp_path), "--dtype", "float32", "--one-process")
    assert "holds figures of another run (dtype: bfloat16, now float32)" in other.stderr


def test_an_unknown_step_is_refused() -> None:
    done = run("--steps", "everything")
    assert done.returncode == 2
    assert "there is no step 'everything'; the steps are: ceilings" in done.stderr
