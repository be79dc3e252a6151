"""Each wrong plugin is convicted, with its name, the hook, what was expected and what came; right ones are not."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fairlead.ops.table import OP_NAMES
from fairlead.testing.conformance import TIERS, Kit, conform
from fairlead.testing.conformance.arguments import MAKERS
from fairlead.testing.conformance.check import FAILED, Result, run_check
from fairlead.testing.conformance.suite import all_checks, make_subject

REGISTRATION = "registration imports no torch"
MESSAGE = re.compile(r"plugin '(\w+)' broke the contract in (.+): expected (.+?), got (.+)", re.DOTALL)


def convictions(name: str, *tiers: str, only: str | None = None) -> Iterator[Result]:
    """What the kit says of a plugin in some tiers, in this process; its registration is a process of its own."""
    subject = make_subject(name, None, full=False)
    checks = [check for check in all_checks(subject, tiers) if check.name == (only or check.name) != REGISTRATION]
    assert checks
    for check in checks:
        result = run_check(check, name, subject.package)
        if result.status == FAILED:
            yield result


def names_in(table: str) -> list[str]:
    """Read from the text, since the module can only be imported once the fixture has made it known."""
    text = (Path(__file__).parent / "wrong_plugins.py").read_text(encoding="utf-8")
    part = text.split(f"{table}: dict[str, Wrong] = {{")[1].split("\n}\n")[0]
    return re.findall(r'^    "(\w+)": Wrong', part, re.MULTILINE)


def parsed(message: str | None, name: str) -> tuple[str, str]:
    """Hook and what was got, of a message that names all four."""
    found = MESSAGE.fullmatch(message or "")
    assert found, message
    assert found[1] == name
    assert found[3]
    assert "\n" not in found[4]
    return found[2], found[4]


def check_message(message: str | None, name: str, hook: str, got: str) -> None:
    found = parsed(message, name)
    assert (hook in found[0], got in found[1]) == (True, True), message


@pytest.mark.parametrize("name", names_in("WRONG"))
def test_a_wrong_plugin_is_convicted(name: str) -> None:
    wrong = importlib.import_module("wrong_plugins").WRONG[name]
    found = []
    for result in convictions(name, wrong.tier, only=wrong.check):
        found.append(parsed(result.message, name))
        if wrong.hook in found[-1][0] and wrong.got in found[-1][1]:
            return
    raise AssertionError(found or "it was acquitted")


def test_there_are_enough_of_them() -> None:
    assert len(names_in("WRONG")) + len(names_in("DEADLY")) >= 60


@pytest.mark.parametrize(
    ("name", "check", "check_s"), [("hangs", "contract: synchronize", 3), ("dies_in_a_step", "engine: 100 steps", 60)]
)
def test_a_deadly_plugin_is_convicted_and_outlived(name: str, check: str, check_s: float) -> None:
    wrong = importlib.import_module("wrong_plugins").DEADLY[name]
    with Kit(name, tiers=["contract", wrong.tier], check_s=check_s) as kit:
        assert kit.list()[1] is None
        result = kit.run(check)
        assert result.status == FAILED
        check_message(result.message, name, wrong.hook, wrong.got)
        assert kit.run("contract: seed").status == "supported"


def test_a_plugin_that_imports_torch_is_convicted() -> None:
    subject = make_subject("eager", None, full=False)
    [check] = [check for check in all_checks(subject, ["contract"]) if check.name == REGISTRATION]
    check_message(
        run_check(check, "eager", subject.package).message, "eager", "fairlead_platforms", "torch was imported"
    )


@pytest.mark.parametrize("tier", TIERS[:-3])
def test_a_right_plugin_is_acquitted(tier: str) -> None:
    assert list(convictions("right", tier)) == []


def test_the_null_platform_is_acquitted(full: bool) -> None:
    tiers = TIERS if full else ("contract", "ops", "attention", "engine")
    with Kit("null", tiers=tiers) as kit:
        results = conform(kit)
    assert [result.message for result in results if result.status == FAILED] == []
    assert {result.tier for result in results} == set(tiers)
    assert any("no arithmetic" in (result.message or "") for result in results if result.tier == "ops")


def test_a_platform_that_there_is_not_is_one_conviction() -> None:
    with Kit("nowhere") as kit:
        [result] = conform(kit)
    assert result.status == FAILED
    assert "there is no platform 'nowhere'" in (result.message or "")


def test_every_op_has_arguments() -> None:
    assert set(MAKERS) == set(OP_NAMES)


def test_the_package_imports_no_torch() -> None:
    code = "import sys, fairlead.testing.conformance, fairlead.testing.null; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
