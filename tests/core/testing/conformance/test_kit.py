"""The kit from outside: on the CPU in every tier, as a pytest plugin, as a command, and what it writes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fairlead.testing.conformance import TIERS, Kit, Result, as_json, as_markdown, as_text, conform
from fairlead.testing.conformance.report import passed

ROOT = Path(__file__).parents[4]
RESULTS = [
    Result(tier="ops", name="linear, own, float32", status="supported", error=1e-6, tolerance=1e-5),
    Result(tier="ops", name="moe, reference, float32", status="reference", error=0.0, tolerance=1e-5),
    Result(tier="engine", name="100 steps", status="unsupported", message="no | room"),
]
FAILURE = Result(tier="engine", name="preemption", status="failed", message="plugin 'x' broke the contract")


@pytest.fixture(scope="module")
def cpu(full: bool) -> list[Result]:
    with Kit("cpu", full=full) as kit:
        return conform(kit)


def test_the_cpu_passes_all_tiers(cpu: list[Result]) -> None:
    assert [result for result in cpu if result.status == "failed"] == []
    assert tuple(dict.fromkeys(result.tier for result in cpu)) == TIERS
    measured = [result for result in cpu if result.error is not None and result.tolerance is not None]
    assert len(measured) > 100
    assert all(result.error <= result.tolerance for result in measured)  # type: ignore[operator]


def test_the_page_of_the_cpu_is_up_to_date(cpu: list[Result], full: bool) -> None:
    if full:
        pytest.skip("the page shows the quick sweep")
    spec = importlib.util.spec_from_file_location("generate_platforms", ROOT / "docs" / "generate_platforms.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = module.cpu_file(cpu)
    assert file.read_text(encoding="utf-8") == module.cpu_page(cpu), "run: python docs/generate_platforms.py"


def test_text_has_verdicts_errors_and_counts() -> None:
    text = as_text("x", RESULTS)
    assert "linear, own, float32     supported, error 1.0e-06 of 1e-05" in text
    assert "moe, reference, float32  falls back to reference, error 0.0e+00 of 1e-05" in text
    assert "100 steps                unsupported: no | room" in text
    assert text.endswith(
        "x conforms to platform contract 1.0: 1 supported, 1 fall back to reference, 1 unsupported, 0 failed"
    )
    assert "x does not conform" in as_text("x", [*RESULTS, FAILURE])


def test_json_and_markdown() -> None:
    record = json.loads(as_json("x", RESULTS))
    assert (record["platform"], record["api"], record["passed"], len(record["results"])) == ("x", "1.0", True, 3)
    assert record["results"][0]["error"] == 1e-6
    page = as_markdown("x", RESULTS)
    assert "## engine" in page
    assert "| 100 steps | unsupported: no / room |  |" in page
    assert "1e-06" not in page  # it differs from machine to machine


def test_nothing_is_no_pass() -> None:
    assert passed(RESULTS)
    assert not passed([*RESULTS, FAILURE])
    assert not passed([])


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "fairlead.testing.conformance.pytest_plugin", "-q", *arguments]
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_as_a_pytest_plugin(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    done = run_pytest(tmp_path, "--fairlead-platform", "null", "--fairlead-tier", "contract", "-k", "report or own")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout  # the memory report, schemes of its own, and test_own
    wrong = run_pytest(
        tmp_path,
        "--fairlead-platform",
        "op_of_none",
        "--fairlead-tier",
        "ops",
        "-k",
        "embedding",
        "--fairlead-timeout=30",
    )
    assert wrong.returncode == 1
    assert "plugin 'op_of_none' broke the contract in ops['embedding'] 'own'" in wrong.stdout
    assert "Traceback" not in wrong.stdout
    missing = run_pytest(tmp_path, "--fairlead-platform", "nowhere")
    assert missing.returncode == 1
    assert "there is no platform 'nowhere'" in missing.stdout


def test_without_the_option_pytest_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    done = run_pytest(tmp_path)
    assert "1 passed" in done.stdout


def conform_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fairlead_server.cli", "conform", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_writes_files_and_exits_with_0(tmp_path: Path) -> None:
    files = ["--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md")]
    done = conform_command("--platform", "null", "--tier", "contract", *files)
    assert done.returncode == 0, done.stderr
    assert "null conforms to platform contract" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["passed"] is True
    assert (tmp_path / "found.md").read_text().startswith("# What the platform `null` supports")


def test_two_platforms_are_compared_in_one_process() -> None:
    done = conform_command("--platform", "cpu", "--against", "right", "--tier", "contract")
    assert done.returncode == 0, done.stdout
    pattern = r"demo, cpu against right, float32 +supported, error \S+ of 0.0001: 128 of 128 greedy tokens equal"
    assert re.search(pattern, done.stdout)


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--platform", "cpu", "--tier", "speed"], 2, "there is no tier 'speed'; the tiers are: contract, ops"),
        (["--platform", "cpu", "--timeout", "0"], 2, "--timeout must be above 0"),
        (["--platform", "nowhere"], 1, ""),
        ([], 2, "--platform"),
    ],
)
def test_the_command_ends_with_its_status(arguments: list[str], status: int, expected: str) -> None:
    done = conform_command(*arguments)
    assert (done.returncode, expected in done.stderr) == (status, True), done.stderr
