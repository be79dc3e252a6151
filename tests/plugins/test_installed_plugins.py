"""Plugins that pip really installed: broken ones are isolated and named, and nothing falls back in silence."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fairlead

Run = Callable[..., Any]

CHOOSE = """
import sys
from fairlead.config import PlatformConfig
from fairlead.errors import PluginError
from fairlead.plugins import choose, create

try:
    record, device = choose(PlatformConfig(platform=sys.argv[1] if len(sys.argv) > 1 else None))
    if "--create" in sys.argv:
        create(record, device)
except PluginError as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(record.name)
"""

# name of the platform, distribution, version, status, what the reason says
EXPECTED = [
    ("broken_import", "acme-broken-import", "1.2.3", "broken", "ImportError: libacme.so.7: cannot open shared object"),
    ("wrong_version", "acme-wrong-version", "3.2.1", "broken", "was written for platform contract 2.0"),
    ("broken_probe", "acme-broken-probe", "0.4.0", "broken", "OSError: the driver answered with code 42"),
    ("returns_none", "acme-returns-none", "0.5.0", "broken", "expected a list of PlatformSpec"),
    ("no_device", "acme-no-device", "0.7.0", "unavailable", "there is no /dev/acme0; is the driver loaded?"),
]
WORKING = [("acme_left", "acme-same-priority"), ("acme_right", "acme-same-priority"), ("unlisted", "acme-unlisted")]


@pytest.fixture
def listed(run: Run) -> dict[str, dict[str, Any]]:
    """What `fairlead platforms --json` prints with every plugin of this folder installed, by name."""
    start = time.perf_counter()
    done = run("-m", "fairlead_server.cli", "platforms", "--json")
    print(f"fairlead platforms --json with {len(EXPECTED) + 2} more plugins: {time.perf_counter() - start:.2f} s")
    assert done.returncode == 0, done.stderr
    return {record["name"]: record for record in json.loads(done.stdout)}


def test_every_plugin_is_listed_with_its_cause(listed: dict[str, dict[str, Any]]) -> None:
    for name, distribution, version, status, reason in EXPECTED:
        record = listed[name]
        assert (record["distribution"], record["version"], record["status"]) == (distribution, version, status)
        assert reason in record["reason"]
        assert "\n" not in record["reason"]


def test_ten_plugins_of_which_some_are_broken_in_different_ways(listed: dict[str, dict[str, Any]]) -> None:
    assert len({record["distribution"] for record in listed.values()}) >= 10
    broken = [record for record in listed.values() if record["status"] == "broken"]
    kinds = {record["reason"].split(":")[0].split(" ")[0] for record in broken}
    assert len(kinds) >= 3, kinds


def test_the_table_says_why_each_was_refused(run: Run) -> None:
    done = run("-m", "fairlead_server.cli", "platforms")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    for name, distribution, version, status, reason in EXPECTED:
        for part in (f"{distribution} {version}", status, reason):
            assert part in lines[name]


def test_the_doctor_names_the_same_causes(run: Run) -> None:
    done = run("-m", "fairlead_server.cli", "doctor", "--json")
    assert done.returncode == 1, done.stderr
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    for name, distribution, version, status, reason in EXPECTED:
        finding = found[f"platform {name}"]
        assert finding["status"] == ("problem" if status == "broken" else "ok")
        assert f"{distribution} {version}: " in finding["found"]
        assert reason in finding["found"]


def test_the_others_keep_working(listed: dict[str, dict[str, Any]]) -> None:
    for name, distribution in [*WORKING, ("cpu", "fairlead-cpu")]:
        assert (listed[name]["status"], listed[name]["distribution"]) == ("available", distribution)


@pytest.mark.parametrize(("name", "distribution", "version", "status", "reason"), EXPECTED)
def test_asking_for_one_by_name_names_the_cause(
    run: Run, name: str, distribution: str, version: str, status: str, reason: str
) -> None:
    done = run("-c", CHOOSE, name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"PlatformUnavailableError: platform '{name}' ({distribution} {version}) is {status}")
    assert reason in done.stderr


def test_the_command_line_ends_with_the_cause(run: Run) -> None:
    done = run("-m", "fairlead_server.cli", "run", "demo", "ROMEO:", "--platform", "broken_import")
    assert (done.returncode, done.stdout) == (1, "")
    assert "acme-broken-import 1.2.3" in done.stderr
    assert "libacme.so.7" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_wrong_version_names_both_distributions_and_versions(run: Run) -> None:
    done = run("-c", CHOOSE, "wrong_version")
    assert (
        f"acme-wrong-version 3.2.1 was written for platform contract 2.0, but fairlead {fairlead.__version__} has 1.0"
    ) in done.stderr


def test_two_platforms_of_equal_priority_are_an_error_that_lists_both(run: Run) -> None:
    done = run("-c", CHOOSE, plugins="cpu,same_priority")
    assert (done.returncode, done.stdout) == (1, "")
    assert "'acme_left' (acme-same-priority 0.6.0) and 'acme_right' (acme-same-priority 0.6.0)" in done.stderr
    assert "--platform" in done.stderr
    assert run("-c", CHOOSE, "acme_right", plugins="cpu,same_priority").stdout == "acme_right\n"


@pytest.mark.parametrize(("name", "distribution", "version", "reason"), [(*e[:3], e[4]) for e in EXPECTED[:4]])
def test_another_platform_is_taken_only_with_a_warning(
    run: Run, name: str, distribution: str, version: str, reason: str
) -> None:
    done = run("-c", CHOOSE, plugins=f"cpu,{name}")
    assert (done.returncode, done.stdout) == (0, "cpu\n")
    assert done.stderr.startswith(f"warning: platform '{name}' ({distribution} {version}) cannot be used: ")
    assert reason in done.stderr


def test_with_no_platform_left_every_reason_is_given(run: Run) -> None:
    done = run("-c", CHOOSE, plugins="no_device,broken_probe")
    assert done.returncode == 1
    assert "no_device: there is no /dev/acme0" in done.stderr
    assert "broken_probe: probe() raised OSError" in done.stderr


def test_an_unlisted_plugin_is_never_imported(run: Run, tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    done = run("-m", "fairlead_server.cli", "platforms", "--json", plugins="cpu", ACME_MARKER=str(marker))
    assert done.returncode == 0, done.stderr
    assert [record["name"] for record in json.loads(done.stdout)] == ["cpu"]
    assert not marker.exists()

    done = run("-c", CHOOSE, "unlisted", plugins="cpu", ACME_MARKER=str(marker))
    assert (done.returncode, done.stdout) == (1, "")
    assert "FAIRLEAD_PLUGINS permits only: cpu" in done.stderr
    assert not marker.exists()

    done = run("-c", CHOOSE, "unlisted", plugins="cpu, unlisted", ACME_MARKER=str(marker))
    assert done.stdout == "unlisted\n"
    assert marker.exists()  # so the marker does tell an import


def test_an_empty_allowlist_permits_none(run: Run) -> None:
    done = run("-c", CHOOSE, plugins="")
    assert done.returncode == 1
    assert "FAIRLEAD_PLUGINS permits only: none" in done.stderr


def test_a_name_on_the_allowlist_that_nothing_brings_is_no_silent_fallback(run: Run) -> None:
    done = run("-c", CHOOSE, plugins="cpu,acme_typo")
    assert done.stdout == "cpu\n"
    assert "warning: platform 'acme_typo'" in done.stderr
    assert "no installed package brings such a plugin" in done.stderr


def test_a_platform_that_cannot_be_created_is_named(run: Run) -> None:
    done = run("-c", CHOOSE, "unlisted", "--create")
    assert done.returncode == 1
    assert done.stderr == (
        "PluginError: platform 'unlisted' (acme-unlisted 1.0.0) failed to create device 'unlisted:0': "
        "RuntimeError: the firmware of Acme Quiet is too old\n"
    )


@pytest.mark.parametrize("first", ["fairlead.plugins", "acme_unlisted"])
def test_the_order_of_imports_makes_no_difference(run: Run, first: str) -> None:
    done = run("-c", f"import {first}; from fairlead.plugins import discover; print([r.name for r in discover()])")
    assert "'unlisted'" in done.stdout
    assert done.stdout == run("-c", "from fairlead.plugins import discover; print([r.name for r in discover()])").stdout


def test_discovery_imports_no_torch(run: Run) -> None:
    code = "import sys; from fairlead.plugins import discover; discover(); print('torch' in sys.modules)"
    assert run("-c", code).stdout == "False\n"
