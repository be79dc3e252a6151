"""All checks of a platform, tier after tier."""

import importlib
from collections.abc import Callable, Sequence

from fairlead.errors import PluginContractError, one_line
from fairlead.testing.conformance.check import AGAINST, TIERS, Check, Outcome
from fairlead.testing.conformance.subject import Subject


def make_subject(name: str, device: str | None, *, full: bool) -> Subject:
    """Chooses the platform. Raises FairleadError with the reason if it cannot be used."""
    return Subject(name, device, full=full)


def all_checks(subject: Subject, tiers: Sequence[str], other: Subject | None = None) -> list[Check]:
    """The checks of the tiers in order, then those against another platform.

    A tier whose checks cannot even be listed, because a hook that they depend on fails, is one check that fails.
    """
    found: list[Check] = []
    for tier in [tier for tier in (*TIERS, AGAINST) if tier in tiers or (tier == AGAINST and other is not None)]:
        if found and not subject.is_created:
            break
        try:
            module = importlib.import_module(f"{__package__}.{tier}")  # one by one: those of models take seconds
            found += module.checks(subject, other) if tier == AGAINST else module.checks(subject)
        except Exception as error:
            found.append(Check(tier=tier, name="all", hook="create", run=_raise(subject, error)))
    return found


def _raise(subject: Subject, error: Exception) -> Callable[[], Outcome]:
    def run() -> Outcome:
        if isinstance(error, PluginContractError):
            raise error
        raise PluginContractError(
            plugin=subject.name, hook="create", expected="hooks that answer without an exception", got=one_line(error)
        )

    return run
