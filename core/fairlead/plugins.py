"""Finds platform plugins, isolates the broken ones, and chooses a platform.

With hookspecs.py the only module that touches pluggy. Discovery has two phases: registration is cheap (each entry
point is imported on its own inside a guard; neither torch nor a driver is loaded), then `probe()` names devices or a
reason. Only the chosen platform is created.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy

import fairlead
from fairlead import hookspecs
from fairlead.config import PlatformConfig
from fairlead.contract import check_platform
from fairlead.errors import (
    FairleadError,
    PlatformUnavailableError,
    PluginContractError,
    PluginError,
    RequestError,
    one_line,
)
from fairlead.interface import PLATFORM_API, Device, LogitsProcessor, Platform, PlatformSpec, SchedulingPolicy

if TYPE_CHECKING:
    from fairlead.ops.listing import ProviderEntry

ENTRY_POINT_GROUP = "fairlead.platforms"
PROCESSOR_GROUP = "fairlead.logits_processors"
POLICY_GROUP = "fairlead.scheduling_policies"
MODELS_GROUP = "fairlead.models"
ALLOWLIST_VARIABLE = "FAIRLEAD_PLUGINS"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformRecord:
    """One platform, or one plugin that brought none: what `fairlead platforms` prints.

    `status` is "available", "unavailable" (its probe gave the reason) or "broken" (import, version or probe failed).
    """

    name: str
    distribution: str
    version: str
    status: str
    reason: str | None = None
    priority: int | None = None
    devices: tuple[Device, ...] = ()
    spec: PlatformSpec | None = None
    diagnose: Callable[[], tuple[str, ...]] | None = None


def allowlist() -> frozenset[str] | None:
    """Entry points that FAIRLEAD_PLUGINS permits (comma-separated names), or None where it is not set."""
    value = os.environ.get(ALLOWLIST_VARIABLE)
    return None if value is None else frozenset(name.strip() for name in value.split(",") if name.strip())


def discover() -> list[PlatformRecord]:
    """Registers and probes every permitted plugin; a broken one becomes a record with its reason.

    An entry point that the allowlist leaves out is never imported and not listed; a name on the allowlist that no
    installed package brings is listed as broken, since it was asked for.
    """
    permitted = allowlist()
    records: list[PlatformRecord] = []
    found = sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: (e.name, e.value))
    for entry_point in found:
        if permitted is None or entry_point.name in permitted:
            records += _load(entry_point)
    for name in (permitted or frozenset()) - {entry_point.name for entry_point in found}:
        reason = f"{ALLOWLIST_VARIABLE} names it, but no installed package brings such a plugin"
        records.append(
            PlatformRecord(name=name, distribution="unknown", version="unknown", status="broken", reason=reason)
        )
    return sorted(records, key=lambda r: (-(r.priority or 0), r.name))


def _load(entry_point: importlib.metadata.EntryPoint) -> list[PlatformRecord]:
    dist = entry_point.dist
    origin = {
        "distribution": dist.name if dist is not None else "unknown",
        "version": dist.version if dist is not None else "unknown",
    }
    try:
        return [_probe(spec, origin) for spec in _register(entry_point)]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a plugin may raise anything, SystemExit included; it is reported, not hidden
        reason = one_line(error)
        return [
            PlatformRecord(
                name=entry_point.name,
                distribution=origin["distribution"],
                version=origin["version"],
                status="broken",
                reason=reason,
            )
        ]


def _register(entry_point: importlib.metadata.EntryPoint) -> Iterable[PlatformSpec]:
    results: list[Any] = _manager(entry_point).hook.fairlead_platforms()
    if len(results) != 1 or not isinstance(results[0], (list, tuple)) or not results[0]:
        got = repr(results[0]) if results else "no implementation or None"
        raise PluginContractError(
            plugin=entry_point.name, hook="fairlead_platforms", expected="a list of PlatformSpec", got=got[:200]
        )
    for spec in results[0]:
        if not _is_well_formed(spec):
            raise PluginContractError(
                plugin=entry_point.name,
                hook="fairlead_platforms",
                expected="PlatformSpec (name: text, priority: integer, probe, create and diagnose: callable, "
                "environment: texts by name, niceness: 0 to 19)",
                got=repr(spec)[:200],
            )
    return list(results[0])


def _manager(entry_point: importlib.metadata.EntryPoint) -> pluggy.PluginManager:
    """A manager with this one plugin: an import that fails stops nobody else."""
    manager = pluggy.PluginManager("fairlead")
    manager.add_hookspecs(hookspecs)
    manager.register(entry_point.load(), name=entry_point.name)
    manager.check_pending()
    return manager


def model_classes() -> dict[str, str]:
    """ "module:Class" by architecture, of every permitted plugin; a broken one is reported on stderr and left out.

    Raises PluginError where two plugins bring the same architecture.
    """
    permitted = allowlist()
    classes: dict[str, str] = {}
    owners: dict[str, str] = {}
    for entry_point in sorted(importlib.metadata.entry_points(group=MODELS_GROUP), key=lambda e: (e.name, e.value)):
        if permitted is not None and entry_point.name not in permitted:
            continue
        owner = f"{entry_point.dist.name} {entry_point.dist.version}" if entry_point.dist else entry_point.name
        for architecture, path in _models_of(entry_point, owner).items():
            if architecture in classes:
                both = f"{owners[architecture]} and {owner}"
                raise PluginError(f"architecture {architecture!r} is brought by {both}; uninstall one of them")
            classes[architecture], owners[architecture] = path, owner
    return classes


def _models_of(entry_point: importlib.metadata.EntryPoint, owner: str) -> dict[str, str]:
    try:
        results: list[Any] = _manager(entry_point).hook.fairlead_models()
        found = results[0] if len(results) == 1 else None
        pairs = found.items() if isinstance(found, dict) else ()
        if not pairs or not all(isinstance(n, str) and isinstance(p, str) and p.count(":") == 1 for n, p in pairs):
            raise PluginContractError(
                plugin=entry_point.name,
                hook="fairlead_models",
                expected='a dict of architecture to "module:Class"',
                got=repr(found)[:200],
            )
        return dict(pairs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # as in _load: a plugin may raise anything
        print(f"warning: the models of {owner} cannot be used: {one_line(error)}", file=sys.stderr)
        return {}


def _is_well_formed(spec: object) -> bool:
    return (
        isinstance(spec, PlatformSpec)
        and isinstance(spec.name, str)
        and spec.name != ""
        and isinstance(spec.priority, int)
        and callable(spec.probe)
        and callable(spec.create)
        and callable(spec.diagnose)
        and isinstance(spec.environment, Mapping)
        and all(isinstance(text, str) for item in spec.environment.items() for text in item)
        and spec.niceness in range(20)
    )


def _probe(spec: PlatformSpec, origin: dict[str, str]) -> PlatformRecord:
    def record(status: str, reason: str | None = None, devices: tuple[Device, ...] = ()) -> PlatformRecord:
        return PlatformRecord(
            name=spec.name,
            status=status,
            reason=reason,
            priority=spec.priority,
            devices=devices,
            spec=spec if status == "available" else None,
            diagnose=spec.diagnose,
            distribution=origin["distribution"],
            version=origin["version"],
        )

    if not api_version_accepted(spec.api_version):
        return record(
            "broken",
            f"{origin['distribution']} {origin['version']} was written for platform contract {spec.api_version}, "
            f"but fairlead {fairlead.__version__} has {PLATFORM_API}; install matching versions",
        )
    try:
        found: object = spec.probe()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return record("broken", f"probe() raised {one_line(error)}")
    if isinstance(found, str) and found:
        return record("unavailable", found)
    if isinstance(found, tuple) and found and all(isinstance(d, Device) for d in found):
        return record("available", devices=found)
    fault = PluginContractError(
        plugin=spec.name, hook="probe", expected="a tuple of Device, or a reason", got=repr(found)[:200]
    )
    return record("broken", str(fault))


def api_version_accepted(version: object, current: str = PLATFORM_API) -> bool:
    """Whether a plugin of this contract version loads: the same major, and the same minor or (from 1.1 on) one less."""
    try:
        major, minor = (int(part) for part in str(version).split("."))
    except ValueError:
        return False
    own_major, own_minor = (int(part) for part in current.split("."))
    return major == own_major and minor >= 0 and own_minor - minor in (0, 1)


def choose(config: PlatformConfig, records: list[PlatformRecord] | None = None) -> tuple[PlatformRecord, Device]:
    """Picks the platform and device that the config asks for, or the available one of the highest priority.

    A device that has the name of a platform, such as "cpu", is that platform's first one. Where none is asked for, a
    broken plugin is reported on stderr: it is never passed over in silence.

    Raises PlatformUnavailableError naming the cause.
    """
    records = discover() if records is None else records
    named = config.platform or next((r.name for r in records if r.name == config.device), None)
    record = _best(records) if named is None else _by_name(named, records)
    if config.device in (None, record.name):
        return record, record.devices[0]
    for device in record.devices:
        if device.name == config.device:
            return record, device
    names = ", ".join(d.name for d in record.devices)
    raise PlatformUnavailableError(f"platform {record.name!r} has no device {config.device!r}; it has: {names}")


def _by_name(name: str, records: list[PlatformRecord]) -> PlatformRecord:
    matches = [r for r in records if r.name == name]
    if not matches:
        known = ", ".join(r.name for r in records) or _NONE_INSTALLED
        raise PlatformUnavailableError(f"there is no platform {name!r}{_restriction()}; found: {known}")
    if len(matches) > 1:
        owners = " and ".join(_owner(r) for r in matches)
        raise PlatformUnavailableError(f"platform {name!r} is brought by {owners}; uninstall one of them")
    record = matches[0]
    if record.status != "available":
        raise PlatformUnavailableError(f"platform {name!r} ({_owner(record)}) is {record.status}: {record.reason}")
    return record


def _best(records: list[PlatformRecord]) -> PlatformRecord:
    for record in records:
        if record.status == "broken":
            print(
                f"warning: platform {record.name!r} ({_owner(record)}) cannot be used: {record.reason}",
                file=sys.stderr,
            )
    available = [r for r in records if r.status == "available"]
    if not available:
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in records)
        raise PlatformUnavailableError(f"no platform can be used here{_restriction()}: {reasons or _NONE_INSTALLED}")
    highest = max(r.priority or 0 for r in available)
    top = [r for r in available if r.priority == highest]
    if len(top) > 1:
        owners = " and ".join(f"{r.name!r} ({_owner(r)})" for r in top)
        raise PlatformUnavailableError(f"platforms {owners} have the same priority; choose one with --platform")
    return top[0]


def load_logits_processor(name: str) -> LogitsProcessor:
    """The logits processor of an entry point, imported on first use and kept.

    Raises RequestError if there is none of that name that may load, or if it cannot be loaded.
    """
    found = _processors.get(name)
    if found is None:
        try:
            found = _processors[name] = _load_callable(PROCESSOR_GROUP, "logits processor", name)
        except PluginError as error:
            raise RequestError(str(error), param="logits_processors") from error
    return found


def create_scheduling_policy(name: str) -> SchedulingPolicy:
    """Makes the scheduling policy of an entry point.

    Raises PluginError if there is none of that name that may load, or if it cannot be made.
    """
    make = _load_callable(POLICY_GROUP, "scheduling policy", name)
    try:
        policy: SchedulingPolicy = make()
    except Exception as error:
        raise PluginError(f"the scheduling policy {name!r} cannot be made: {one_line(error)}") from error
    if not callable(getattr(policy, "key", None)):
        raise PluginContractError(
            plugin=name, hook="key", expected="a SchedulingPolicy", got=f"{type(policy).__name__} without it"
        )
    return policy


def _load_callable(group: str, what: str, name: str) -> Callable[..., Any]:
    """What an entry point names. Raises PluginError."""
    permitted = allowlist()
    known = {
        entry_point.name: entry_point
        for entry_point in importlib.metadata.entry_points(group=group)
        if permitted is None or entry_point.name in permitted
    }
    if name not in known:
        found = ", ".join(sorted(known)) or "none"
        raise PluginError(f"there is no {what} {name!r:.100}{_restriction()}; found: {found}")
    try:
        loaded: Callable[..., Any] = known[name].load()
    except Exception as error:
        raise PluginError(f"the {what} {name!r} cannot be loaded: {one_line(error)}") from error
    if not callable(loaded):
        raise PluginError(f"the {what} {name!r} is no callable but a {type(loaded).__name__}")
    return loaded


_processors: dict[str, LogitsProcessor] = {}
_NONE_INSTALLED = "none; install one, for example: pip install 'fairlead[cpu]'"


def _owner(record: PlatformRecord) -> str:
    return f"{record.distribution} {record.version}"


def _restriction() -> str:
    permitted = allowlist()
    if permitted is None:
        return ""
    return f" ({ALLOWLIST_VARIABLE} permits only: {', '.join(sorted(permitted)) or 'none'})"


def expected(config: PlatformConfig) -> PlatformSpec | None:
    """The platform that an engine's process will choose; None if it will fail to."""
    found = (record.spec for record in discover() if config.platform in (None, record.name))
    return next((spec for spec in found if spec is not None), None)


def create(record: PlatformRecord, device: Device) -> Platform:
    """Creates the platform.

    Raises PluginContractError if what comes back is no Platform as it should be, PluginError naming the plugin if it
    raises.
    """
    assert record.spec is not None
    try:
        platform = record.spec.create(device)
    except FairleadError:
        raise
    except Exception as error:
        raise PluginError(
            f"platform {record.name!r} ({_owner(record)}) failed to create device {device.name!r}: {one_line(error)}"
        ) from error
    check_platform(platform, record.name, device)
    return platform


def providers(name: str) -> "list[ProviderEntry]":
    """Creates the named platform on its first device and lists what it brings. Raises as `choose` and `create` do."""
    from fairlead.ops.listing import list_providers  # torch enters here

    return list_providers(create(*choose(PlatformConfig(platform=name))))
