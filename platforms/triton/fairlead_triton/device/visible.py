"""Which devices the environment leaves visible. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def selection(environment: Mapping[str, str], variable: str) -> list[str] | None:
    """The entries of a variable such as CUDA_VISIBLE_DEVICES; None where it is not set."""
    value = environment.get(variable)
    return None if value is None else [entry.strip() for entry in value.split(",")]


def visible(
    entries: Sequence[str] | None, devices: Sequence[T], names: Callable[[T], str]
) -> tuple[list[T], str | None]:
    """The devices that the entries name, in their order, and the entry at which the list ends because it names none.

    An entry is a number or the beginning of a device's unique name; from one that is neither on, the drivers ignore
    the rest, a negative one being the usual way to hide all.
    """
    if entries is None:
        return list(devices), None
    found: list[T] = []
    for entry in entries:
        if entry.isdigit() and int(entry) < len(devices):
            found.append(devices[int(entry)])
            continue
        named = [d for d in devices if entry and not entry.isdigit() and names(d).startswith(entry)]
        if len(named) != 1:
            return found, entry
        found += named
    return found, None


def hidden(variable: str, value: str, stopped_at: str | None, num_devices: int) -> str:
    """The reason where nothing is left."""
    what = "is empty" if not value.strip() else f"is {value!r}"
    there = f"{num_devices} device{'s are' if num_devices != 1 else ' is'} there"
    why = "" if not stopped_at or stopped_at.startswith("-") else f", and {stopped_at!r} is none of them"
    return f"{variable} {what}, which hides all devices ({there}{why}); unset it, or name devices by number"
