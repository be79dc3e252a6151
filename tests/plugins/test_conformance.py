"""The kit on plugins that pip installed: strangers' devices are acquitted, broken plugins convicted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

QUICK = (
    "contract",
    "ops",
    "attention",
    "quantisation",
)  # engine and server: test_foreign_devices.py; all: the full run


@pytest.mark.parametrize("name", ["toy", "hello"])
def test_a_strangers_device_is_acquitted(run: Run, tmp_path: Path, name: str, full: bool) -> None:
    file = tmp_path / "found.json"
    tiers = () if full else tuple(f"--tier={tier}" for tier in QUICK)
    done = run("-m", "fairlead_server.cli", "conform", "--platform", name, "--json", str(file), *tiers)
    results = json.loads(file.read_text())["results"]
    reasons = [result["message"] for result in results if result["status"] == "unsupported"]
    if any("cannot register a device" in (result["message"] or "") for result in results):
        pytest.skip(results[0]["message"])
    assert done.returncode == 0, [result["message"] for result in results if result["status"] == "failed"]
    assert set(reasons) <= {
        "the toy knows plain causal attention only",
        "capabilities.head_sizes does not list it",
        "max_swap_bytes is None",
    }
    assert len(results) > 60


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken_import", "ImportError: libacme.so.7"),
        ("wrong_version", "was written for platform contract 2.0"),
        ("broken_probe", "probe() raised OSError"),
        ("returns_none", "broke the contract in fairlead_platforms: expected a list of PlatformSpec, got"),
        ("unlisted", "broke the contract in create: expected no exception, got PluginError"),
    ],
)
def test_a_broken_plugin_is_convicted_with_its_cause(run: Run, name: str, reason: str) -> None:
    done = run("-m", "fairlead_server.cli", "conform", "--platform", name, "--tier", "contract")
    assert done.returncode == 1
    assert reason in done.stdout
    assert f"{name} does not conform" in done.stdout


def test_a_platform_without_its_device_is_examined_as_far_as_that_goes(run: Run) -> None:
    arguments = ("-m", "fairlead_server.cli", "conform", "--platform", "no_device", "--tier", "contract")
    done = run(*arguments)
    assert done.returncode == 0
    assert "unsupported: no device here: there is no /dev/acme0" in done.stdout
    done = run(*arguments, "--tier", "engine")
    assert done.returncode == 1
    assert "FAILED: platform 'no_device' (acme-no-device 0.7.0) is unavailable: there is no /dev/acme0" in done.stdout
