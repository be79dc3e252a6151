"""What can be asked of a platform whose device is not here: that it registers cheaply, and says why it is not."""

from collections.abc import Callable, Iterator, Sequence

from fairlead import plugins
from fairlead.errors import PluginContractError
from fairlead.testing.conformance.check import FAILED, TIERS, UNSUPPORTED, Check, Outcome
from fairlead.testing.conformance.registration import imports_torch


def find(name: str) -> plugins.PlatformRecord | None:
    """The record of a platform that is installed whole and has no device here."""
    matches = [record for record in plugins.discover() if record.name == name]
    return matches[0] if len(matches) == 1 and matches[0].status == "unavailable" else None


def checks(record: plugins.PlatformRecord, tiers: Sequence[str]) -> Iterator[Check]:
    """Of the contract tier what needs no device; every other tier that was asked for fails, since nothing of it ran."""
    if TIERS[0] in tiers:
        asked: list[tuple[str, str, Callable[[plugins.PlatformRecord], Outcome]]] = [
            ("registration imports no torch", "fairlead_platforms", _registration),
            ("probe repeats itself", "probe", _probe),
            ("diagnose", "diagnose", _diagnose),
            ("everything on the device", "create", _absent),
        ]
        for name, hook, ask in asked:
            yield Check(tier=TIERS[0], name=name, hook=hook, run=_bound(ask, record))
    for tier in TIERS[1:]:
        if tier in tiers:
            yield Check(tier=tier, name="all", hook="create", run=_bound(_refuse, record))


def _bound(ask: Callable[[plugins.PlatformRecord], Outcome], record: plugins.PlatformRecord) -> Callable[[], Outcome]:
    return lambda: ask(record)


def _registration(record: plugins.PlatformRecord) -> Outcome:
    if imports_torch(record.distribution):
        raise PluginContractError(
            plugin=record.name,
            hook="fairlead_platforms",
            expected="registration and probe without torch",
            got="torch was imported",
        )
    return Outcome()


def _probe(record: plugins.PlatformRecord) -> Outcome:
    again = find(record.name)
    if again is None or again.reason != record.reason:
        got = "another verdict" if again is None else again.reason
        raise PluginContractError(plugin=record.name, hook="probe", expected=f"again: {record.reason}", got=str(got))
    return Outcome()


def _diagnose(record: plugins.PlatformRecord) -> Outcome:
    found: object = () if record.diagnose is None else record.diagnose()
    if not isinstance(found, tuple) or not all(isinstance(text, str) for text in found):
        raise PluginContractError(
            plugin=record.name, hook="diagnose", expected="a tuple of sentences", got=repr(found)[:200]
        )
    return Outcome()


def _absent(record: plugins.PlatformRecord) -> Outcome:
    return Outcome(status=UNSUPPORTED, reason=f"no device here: {record.reason}")


def _refuse(record: plugins.PlatformRecord) -> Outcome:
    owner = f"{record.distribution} {record.version}"
    reason = f"platform {record.name!r} ({owner}) is {record.status}: {record.reason}"
    return Outcome(status=FAILED, reason=reason)  # no breach of the contract, but no examination either
