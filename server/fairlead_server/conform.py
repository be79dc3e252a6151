"""`fairlead conform`: runs the conformance kit on one platform, and writes what it found. No torch."""

import sys
from collections.abc import Sequence
from pathlib import Path

from fairlead.errors import ConfigError
from fairlead.testing.conformance import TIERS, Kit, Result, as_json, as_markdown, as_text, conform
from fairlead.testing.conformance.report import passed


def run(
    platform: str,
    *,
    tiers: Sequence[str],
    device: str | None,
    against: str | None,
    full: bool,
    check_s: float,
    json_file: Path | None,
    markdown_file: Path | None,
) -> int:
    """Prints the support matrix; returns the exit status: 0, or 1 where a check failed. Raises ConfigError."""
    unknown = [tier for tier in tiers if tier not in TIERS]
    if unknown:
        raise ConfigError(f"there is no tier {unknown[0]!r}; the tiers are: {', '.join(TIERS)}")
    if check_s <= 0:
        raise ConfigError(f"--timeout must be above 0 seconds, got {check_s:g}")
    with Kit(platform, tiers=tiers or TIERS, device=device, against=against, full=full, check_s=check_s) as kit:
        results = conform(kit, _show if sys.stderr.isatty() else lambda result: None)
    print(as_text(platform, results))
    for file, text in ((json_file, as_json(platform, results)), (markdown_file, as_markdown(platform, results))):
        if file is not None:
            file.write_text(text, encoding="utf-8")
    return 0 if passed(results) else 1


def _show(result: Result) -> None:
    """Progress, on a terminal only."""
    print(f"\r\x1b[K{result.id}: {result.status}", end="", file=sys.stderr, flush=True)
