"""Writes docs/platforms/cpu.md, or cpu_without_kernels.md where the package was built without its native kernels: what
the conformance kit finds of the CPU. A test fails when it is out of date.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from fairlead.testing.conformance import Kit, Result, as_markdown, as_text, conform
from fairlead.testing.conformance.report import passed

FOLDER = Path(__file__).parent / "platforms"


def cpu_file(results: Sequence[Result]) -> Path:
    """The page that these results belong on."""
    has_kernels = any(r.tier == "attention" and r.name.startswith("native,") for r in results)
    return FOLDER / ("cpu.md" if has_kernels else "cpu_without_kernels.md")


def cpu_page(results: Sequence[Result]) -> str:
    """The page."""
    note = "Written by `python docs/generate_platforms.py`, from what `fairlead conform --platform cpu` finds.\n"
    title, rest = as_markdown("cpu", results).split("\n", 1)
    return f"{title}\n\n{note}{rest}"


if __name__ == "__main__":
    with Kit("cpu") as kit:
        found = conform(kit)
    if not passed(found):
        sys.exit(as_text("cpu", found))
    cpu_file(found).write_text(cpu_page(found), encoding="utf-8")
    print(f"wrote {cpu_file(found)}", file=sys.stderr)
