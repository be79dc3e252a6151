"""How the verdicts of a platform are told: to people, to programs, and to the documentation. No torch."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from fairlead.interface import PLATFORM_API
from fairlead.testing.conformance.check import FAILED, REFERENCE, SUPPORTED, UNSUPPORTED, Result

_WORDS = {SUPPORTED: "supported", REFERENCE: "falls back to reference", UNSUPPORTED: "unsupported", FAILED: "FAILED"}


def passed(results: Iterable[Result]) -> bool:
    """Whether there are results and none is a conviction."""
    found = list(results)
    return bool(found) and all(result.status != FAILED for result in found)


def as_text(platform: str, results: Sequence[Result]) -> str:
    """The support matrix, tier by tier, and a verdict."""
    lines = []
    width = max((len(result.name) for result in results), default=0)
    for tier in _tiers(results):
        lines += [tier, *(f"  {_line(r, width)}".rstrip() for r in results if r.tier == tier)]
    return "\n".join([*lines, verdict(platform, results)])


def verdict(platform: str, results: Sequence[Result]) -> str:
    """One sentence with the counts."""
    counts = {status: sum(result.status == status for result in results) for status in _WORDS}
    word = "conforms to" if passed(results) else "does not conform to"
    return (
        f"{platform} {word} platform contract {PLATFORM_API}: {counts[SUPPORTED]} supported, {counts[REFERENCE]} fall "
        f"back to reference, {counts[UNSUPPORTED]} unsupported, {counts[FAILED]} failed"
    )


def as_json(platform: str, results: Sequence[Result]) -> str:
    """{"platform", "api", "passed", "results": [...]}."""
    record = {"platform": platform, "api": PLATFORM_API, "passed": passed(results)}
    return json.dumps(record | {"results": [asdict(result) for result in results]}, indent=2) + "\n"


def as_markdown(platform: str, results: Sequence[Result]) -> str:
    """A table per tier, for documentation: measured errors are left out, since they differ from machine to machine."""
    lines = [f"# What the platform `{platform}` supports", "", verdict(platform, results) + ".", ""]
    for tier in _tiers(results):
        lines += [f"## {tier}", "", "| Check | Verdict | Tolerance |", "|---|---|---|"]
        for result in results:
            if result.tier == tier:
                word = _WORDS[result.status] + (f": {result.message}" if result.message else "")
                tolerance = "" if result.tolerance is None else f"{result.tolerance:g}"
                lines.append(f"| {result.name} | {word.replace('|', '/')} | {tolerance} |")
        lines.append("")
    return "\n".join(lines)


def _tiers(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.tier for result in results))


def _line(result: Result, width: int) -> str:
    text = f"{result.name:<{width}}  {_WORDS[result.status]}"
    if result.error is not None:
        text += f", error {result.error:.1e}"
        text += f" of {result.tolerance:g}" if result.tolerance is not None else ""
    return f"{text}: {result.message}" if result.message else text
