"""Choosing a platform, and what discovery makes of modules that break the contract in their own way."""

import importlib.metadata
import re
import sys
import types
from typing import Any

import pytest

from fairlead import plugins
from fairlead.config import PlatformConfig
from fairlead.errors import PlatformUnavailableError, PluginContractError, PluginError
from fairlead.interface import PLATFORM_API, Device, PlatformSpec, hookimpl
from fairlead.models import registry
from fairlead.plugins import (
    PlatformRecord,
    allowlist,
    api_version_accepted,
    choose,
    create,
    discover,
    model_classes,
)

DEVICE = Device(name="x:0", description="X", memory_bytes=1)


def spec(**changes: Any) -> PlatformSpec:
    fields: dict[str, Any] = {"name": "x", "api_version": PLATFORM_API, "priority": 1, "create": lambda device: None}
    return PlatformSpec(**{**fields, "probe": lambda: (DEVICE,), **changes})


def record(name: str, status: str = "available", **changes: Any) -> PlatformRecord:
    devices = tuple(Device(name=f"{name}:{i}", description="", memory_bytes=1) for i in range(2))
    fields: dict[str, Any] = {"distribution": f"pkg-{name}", "version": "1.5", "priority": 10}
    fields |= {"devices": devices} if status == "available" else {"reason": f"{name} has its reason"}
    return PlatformRecord(name=name, status=status, **{**fields, **changes})


@pytest.mark.parametrize(
    ("current", "accepted", "refused"),
    [
        ("1.0", ["1.0"], ["0.9", "1.1", "2.0", "0.0", "1.-1"]),
        ("1.1", ["1.1", "1.0"], ["1.2", "2.1", "0.1", "2.0"]),
        ("1.2", ["1.2", "1.1"], ["1.0", "1.3", "2.2"]),
        ("2.0", ["2.0"], ["1.9", "1.0", "2.1"]),
    ],
)
def test_a_core_takes_its_own_contract_and_the_one_before(
    current: str, accepted: list[str], refused: list[str]
) -> None:
    assert [v for v in (*accepted, *refused) if api_version_accepted(v, current)] == accepted


@pytest.mark.parametrize("version", ["", "1", "1.0.0", "one.two", "1.x", None, 1, (1, 0)])
def test_what_is_no_version_is_refused(version: object) -> None:
    assert not api_version_accepted(version, "1.0")


def test_the_highest_priority_is_taken_in_whatever_order() -> None:
    records = [record("cpu", priority=0), record("far", priority=100), record("near", priority=50)]
    for order in (records, records[::-1]):
        chosen, device = choose(PlatformConfig(), order)
        assert (chosen.name, device.name) == ("far", "far:0")


def test_priorities_may_be_negative() -> None:
    assert choose(PlatformConfig(), [record("a", priority=-2), record("b", priority=-1)])[0].name == "b"


def test_a_platform_without_devices_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    chosen, _ = choose(PlatformConfig(), [record("far", "unavailable", priority=100), record("cpu", priority=0)])
    assert chosen.name == "cpu"
    assert capsys.readouterr().err == ""


def test_a_broken_plugin_is_passed_over_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose(PlatformConfig(), [record("far", "broken"), record("cpu")])[0].name == "cpu"
    assert capsys.readouterr().err == ("warning: platform 'far' (pkg-far 1.5) cannot be used: far has its reason\n")


def test_a_platform_is_chosen_by_name_whatever_its_priority() -> None:
    assert choose(PlatformConfig(platform="cpu"), [record("far"), record("cpu", priority=0)])[0].name == "cpu"


@pytest.mark.parametrize("status", ["broken", "unavailable"])
def test_asking_for_one_that_cannot_run_is_an_error(status: str) -> None:
    with pytest.raises(PlatformUnavailableError, match=rf"'far' \(pkg-far 1.5\) is {status}: far has its reason"):
        choose(PlatformConfig(platform="far"), [record("far", status), record("cpu")])


def test_asking_for_one_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(PlatformUnavailableError, match=r"there is no platform 'cqu'; found: far, cpu"):
        choose(PlatformConfig(platform="cqu"), [record("far"), record("cpu")])
    with pytest.raises(PlatformUnavailableError, match=r"found: none; install one"):
        choose(PlatformConfig(platform="cqu"), [])


def test_equal_priorities_are_an_error_that_lists_both() -> None:
    records = [record("cpu", priority=0), record("left"), record("right")]
    with pytest.raises(
        PlatformUnavailableError, match=r"'left' \(pkg-left 1.5\) and 'right' \(pkg-right 1.5\).*--plat"
    ):
        choose(PlatformConfig(), records)
    assert choose(PlatformConfig(platform="right"), records)[0].name == "right"


@pytest.mark.parametrize("status", ["available", "broken"])
def test_one_name_from_two_packages_is_an_error(status: str) -> None:
    twin = record("cpu", status, distribution="pkg-other")
    with pytest.raises(PlatformUnavailableError, match=r"pkg-cpu 1.5 and pkg-other 1.5; uninstall one"):
        choose(PlatformConfig(platform="cpu"), [record("cpu"), twin])


def test_with_nothing_left_every_reason_is_given() -> None:
    with pytest.raises(PlatformUnavailableError, match=r"a: a has its reason; b: b has its reason"):
        choose(PlatformConfig(), [record("a", "broken"), record("b", "unavailable")])
    with pytest.raises(PlatformUnavailableError, match=r"none; install one"):
        choose(PlatformConfig(), [])


def test_a_device_is_chosen_by_name() -> None:
    assert choose(PlatformConfig(device="cpu:1"), [record("cpu")])[1].name == "cpu:1"
    with pytest.raises(PlatformUnavailableError, match=r"'cpu' has no device 'cpu:2'; it has: cpu:0, cpu:1"):
        choose(PlatformConfig(platform="cpu", device="cpu:2"), [record("cpu")])


def test_a_device_named_like_a_platform_is_that_platforms_first_one() -> None:
    records = [record("far", priority=100), record("cpu", priority=0), record("off", "unavailable")]
    for config in (PlatformConfig(device="cpu"), PlatformConfig(platform="cpu", device="cpu")):
        chosen, device = choose(config, records)
        assert (chosen.name, device.name) == ("cpu", "cpu:0")
    with pytest.raises(PlatformUnavailableError, match=r"'off' .* is unavailable: off has its reason"):
        choose(PlatformConfig(device="off"), records)
    with pytest.raises(PlatformUnavailableError, match=r"'far' has no device 'cpu'"):
        choose(PlatformConfig(platform="far", device="cpu"), records)
    assert PlatformConfig(device="auto") == PlatformConfig()


def test_the_allowlist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAIRLEAD_PLUGINS", raising=False)
    assert allowlist() is None
    monkeypatch.setenv("FAIRLEAD_PLUGINS", " a, b,,")
    assert allowlist() == frozenset({"a", "b"})
    monkeypatch.setenv("FAIRLEAD_PLUGINS", "")
    assert allowlist() == frozenset()


def discovered(monkeypatch: pytest.MonkeyPatch, result: object) -> PlatformRecord:
    """The record of a plugin whose hook returns (or raises) `result`."""

    def fairlead_platforms() -> object:
        if isinstance(result, BaseException):
            raise result
        return result

    module = types.ModuleType("made_up_plugin")
    module.fairlead_platforms = hookimpl(fairlead_platforms)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up_plugin", module)
    entry_point = importlib.metadata.EntryPoint(name="made_up", value="made_up_plugin", group="fairlead.platforms")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (entry_point,))
    monkeypatch.delenv("FAIRLEAD_PLUGINS", raising=False)
    (found,) = discover()
    return found


def test_a_good_plugin_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    found = discovered(monkeypatch, [spec()])
    assert (found.name, found.status, found.reason, found.devices) == ("x", "available", None, (DEVICE,))
    assert found.spec is not None


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "got no implementation or None"),
        ([], "expected a list of PlatformSpec, got []"),
        ("cpu", "expected a list of PlatformSpec, got 'cpu'"),
        ([None], "expected PlatformSpec"),
        ([spec(), "y"], "expected PlatformSpec"),
        ([spec(priority="high")], "priority: integer"),
        ([spec(name="")], "name: text"),
        ([spec(probe=None)], "probe, create and diagnose: callable"),
        ([spec(create=None)], "probe, create and diagnose: callable"),
        ([spec(diagnose="no")], "probe, create and diagnose: callable"),
        ([spec(environment=None)], "environment: texts by name"),
        ([spec(environment={"N": 1})], "environment: texts by name"),
        ([spec(niceness=-1)], "niceness: 0 to 19"),
        (ValueError("no good"), "ValueError: no good"),
        (SystemExit(3), "SystemExit: 3"),
    ],
)
def test_a_hook_that_breaks_the_contract_is_listed(
    monkeypatch: pytest.MonkeyPatch, result: object, reason: str
) -> None:
    found = discovered(monkeypatch, result)
    assert (found.name, found.status, found.spec, found.devices) == ("made_up", "broken", None, ())
    assert found.reason is not None
    assert reason in found.reason


@pytest.mark.parametrize(
    ("asked", "name"), [(None, "best"), ("best", "best"), ("plain", "plain"), ("broken", None), ("z", None)]
)
def test_the_platform_to_be_chosen_is_known_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, name: str | None
) -> None:
    records = [record("broken", "broken"), *(record(each, spec=spec(name=each)) for each in ("best", "plain"))]
    monkeypatch.setattr(plugins, "discover", lambda: records)
    found = plugins.expected(PlatformConfig(platform=asked))
    assert (found and found.name) == name


@pytest.mark.parametrize("answer", [None, (), "", [DEVICE], ("x:0",), 1])
def test_a_probe_that_answers_neither_devices_nor_a_reason_is_listed(
    monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    found = discovered(monkeypatch, [spec(probe=lambda: answer)])
    assert (found.name, found.status, found.spec) == ("x", "broken", None)
    assert "expected a tuple of Device, or a reason" in (found.reason or "")


@pytest.mark.parametrize("error", [RuntimeError("no answer"), SystemExit(9)])
def test_a_probe_that_raises_is_listed_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def probe() -> tuple[Device, ...]:
        raise error

    found = discovered(monkeypatch, [spec(probe=probe)])
    assert (found.name, found.status, found.reason) == (
        "x",
        "broken",
        f"probe() raised {type(error).__name__}: {error}",
    )


def test_a_plugin_of_another_contract_is_never_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    found = discovered(monkeypatch, [spec(api_version="9.9", probe=lambda: calls.append("probe"))])
    assert (found.status, calls) == ("broken", [])
    assert "platform contract 9.9" in (found.reason or "")


def test_an_interrupt_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        discovered(monkeypatch, KeyboardInterrupt())


def test_what_create_returns_must_be_a_platform() -> None:
    bare = record("x", spec=spec(create=lambda device: types.SimpleNamespace(name="x", device=device)))
    with pytest.raises(PluginContractError, match=r"'x' broke the contract in create.*without torch_device, capabil"):
        create(bare, DEVICE)
    with pytest.raises(PluginContractError, match=r"got NoneType without name, device"):
        create(record("x", spec=spec()), DEVICE)


def test_what_create_raises_is_named_after_the_plugin() -> None:
    def fail(device: Device) -> None:
        raise OSError("out\nof order")

    with pytest.raises(PluginError, match=r"'x' \(pkg-x 1.5\) failed to create device 'x:0': OSError: out of order"):
        create(record("x", spec=spec(create=fail)), DEVICE)


def test_an_error_of_ours_that_create_raises_stays_as_it_is() -> None:
    def refuse(device: Device) -> None:
        raise PlatformUnavailableError("taken")

    with pytest.raises(PlatformUnavailableError, match=r"^taken$"):
        create(record("x", spec=spec(create=refuse)), DEVICE)


def brought(monkeypatch: pytest.MonkeyPatch, **results: object) -> dict[str, str]:
    """What model_classes finds with plugins whose hook returns (or raises) these."""
    entry_points = []
    for name, result in results.items():

        def fairlead_models(result: object = result) -> object:
            if isinstance(result, BaseException):
                raise result
            return result

        module = types.ModuleType(name)
        module.fairlead_models = hookimpl(fairlead_models)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
        entry_points.append(importlib.metadata.EntryPoint(name=name, value=name, group="fairlead.models"))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: tuple(entry_points))
    return model_classes()


def test_plugins_bring_model_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = brought(monkeypatch, left={"AForCausalLM": "acme.a:A"}, right={"BForCausalLM": "acme.b:B"})
    assert found == {"AForCausalLM": "acme.a:A", "BForCausalLM": "acme.b:B"}
    monkeypatch.setenv("FAIRLEAD_PLUGINS", "right")
    assert list(brought(monkeypatch, left={"A": "acme.a:A"}, right={"B": "acme.b:B"})) == ["B"]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (OSError("no\ndriver"), "OSError: no driver"),
        (None, "expected a dict of architecture"),
        ({}, "expected a dict of architecture"),
        ({"A": "acme.a.A"}, "expected a dict of architecture"),
        ({"A": 1}, "expected a dict of architecture"),
    ],
)
def test_broken_models_are_named_and_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: object, reason: str
) -> None:
    assert brought(monkeypatch, broken=result, good={"B": "acme.b:B"}) == {"B": "acme.b:B"}
    error = capsys.readouterr().err
    assert reason in error
    assert "broken" in error


def test_one_architecture_from_two_plugins_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PluginError, match="'A' is brought by left and right"):
        brought(monkeypatch, left={"A": "acme.a:A"}, right={"A": "acme.b:A"})


def test_models_are_imported_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "model_classes", lambda: {"AcmeForCausalLM": "acme_missing:Acme"})
    registry.check_supported("AcmeForCausalLM")
    with pytest.raises(PluginError, match="acme_missing:Acme that a plugin names cannot be imported"):
        registry.read_config("AcmeForCausalLM", {})


class Shortest:
    def key(self, request: object) -> float:
        return 0.0


def fail() -> None:
    raise OSError("no licence")


@pytest.mark.parametrize(
    ("name", "named", "error"),
    [
        ("shortest", "Shortest", None),
        ("longest", "Shortest", "there is no scheduling policy 'longest'; found: shortest"),
        ("shortest", "missing", "the scheduling policy 'shortest' cannot be loaded: AttributeError"),
        ("shortest", "__name__", "the scheduling policy 'shortest' is no callable but a str"),
        ("shortest", "fail", "the scheduling policy 'shortest' cannot be made: OSError: no licence"),
        ("shortest", "list", "expected a SchedulingPolicy, got list without it"),
    ],
)
def test_a_scheduling_policy_is_made_by_name(
    name: str, named: str, error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "builtins" if named == "list" else __name__
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    entry_point = importlib.metadata.EntryPoint("shortest", f"{module}:{named}", plugins.POLICY_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (entry_point,))
    if error is None:
        assert isinstance(plugins.create_scheduling_policy(name), Shortest)
    else:
        with pytest.raises(PluginError, match=re.escape(error)):
            plugins.create_scheduling_policy(name)
