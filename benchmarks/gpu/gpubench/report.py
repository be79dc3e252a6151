"""The report: targets beside what was measured, then every case, from the files of the steps alone. No torch."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpubench.plot import bar_chart

STEPS = ("ceilings", "correctness", "kernels", "decode", "prefill", "end_to_end")
Cases = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """`measured` finds the figure among all cases of a step, or raises KeyError where it is not there."""

    label: str
    step: str
    wanted: float
    measured: Callable[[Cases], float]
    is_most: bool = False

    def is_met(self, value: float) -> bool:
        return value <= self.wanted if self.is_most else value >= self.wanted


def _of(case: str, key: str) -> Callable[[Cases], float]:
    return lambda cases: float(cases[case][key])


def _ratio(model: str, system: str) -> Callable[[Cases], float]:
    key = "output_tokens_per_s"
    return lambda cases: float(cases[f"{model}: fairlead"][key] / cases[f"{model}: transformers {system}"][key])


def _worst_overhead(cases: Cases) -> float:
    small = ("1 x 128", "8 x 128", "64 x 128")
    found = [c["overhead_us"] for n, c in cases.items() if n.split(", ")[1] in small and "overhead_us" in c]
    if not found:
        raise KeyError("overhead_us")
    return float(max(found))


TARGETS = (
    Target(label="decode, 8B-shaped, batch 1: share of copy bandwidth", step="decode", wanted=0.80,
           measured=_of("llama8b, 1 x 128", "share")),
    Target(label="decode, 1B-shaped, batch 1: share of copy bandwidth", step="decode", wanted=0.65,
           measured=_of("llama1b, 1 x 128", "share")),
    Target(label="overhead per decode step, batch 64 and below, µs", step="decode", wanted=150.0,
           measured=_worst_overhead, is_most=True),
    Target(label="decode attention, 64 x 4096: share of copy bandwidth", step="kernels", wanted=0.75,
           measured=_of("decode attention 64 x 4096, D 128", "share")),
    Target(label="prefill attention, 8192, D 128: share of matmul rate", step="kernels", wanted=0.50,
           measured=_of("prefill attention 8192, D 128", "share")),
    Target(label="prefill, 8B-shaped, 8192 tokens: share of matmul rate", step="prefill", wanted=0.60,
           measured=_of("llama8b, 8192", "share")),
    Target(label="end to end, x transformers one by one", step="end_to_end", wanted=24.0,
           measured=_ratio("llama1b", "one by one")),
    Target(label="end to end, x transformers' continuous batching", step="end_to_end", wanted=3.0,
           measured=_ratio("llama1b", "continuous batching")),
)  # fmt: skip
"""Those of the issue, in its order."""


def write(out: Path) -> Path:
    """Writes report.md and its plots into the folder of the results; returns the report."""
    files = {step: out / f"{step}.json" for step in STEPS}
    data = {s: json.loads(f.read_text(encoding="utf-8")) for s, f in files.items() if f.is_file()}
    cases: dict[str, Cases] = {step: found["cases"] for step, found in data.items()}
    lines = ["# Benchmarks of an accelerator", ""]
    for step, found in data.items():
        lines.append(f"* {step}: " + ", ".join(f"{k} {v}" for k, v in found["environment"].items()))
    is_tiny = any(found["environment"].get("is_tiny") for found in data.values())
    if is_tiny:
        lines += ["", "**A dry run at tiny sizes: it proves that the code runs; its figures mean nothing.**"]
    lines += ["", "## Targets", "", "| | target | measured | |", "|---|---|---|---|", *_targets(cases, is_tiny)]
    for step, found in cases.items():
        lines += ["", f"## {step}", "", *_table(found), *_plot(out, step, found)]
    path = out / "report.md"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def _targets(cases: dict[str, Cases], is_tiny: bool) -> list[str]:
    rows = []
    for target in TARGETS:
        sign = "≤" if target.is_most else "≥"
        try:
            value = target.measured(cases[target.step])
            text, verdict = f"{value:.3g}", "dry run" if is_tiny else "met" if target.is_met(value) else "missed"
        except KeyError:
            text, verdict = "", "not measured"
        rows.append(f"| {target.label} | {sign} {target.wanted:g} | {text} | {verdict} |")
    return rows


def _table(cases: Cases) -> list[str]:
    names = list(dict.fromkeys(key for case in cases.values() for key in case))
    rows = ["| case | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, case in cases.items():
        rows.append(f"| {name} | " + " | ".join(_text(case.get(key)) for key in names) + " |")
    return rows


def _text(value: Any) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _plot(out: Path, step: str, cases: Cases) -> list[str]:
    """A chart of what the step is about: rates end to end, shares of a ceiling everywhere else."""
    key = "output_tokens_per_s" if step == "end_to_end" else "share"
    bars = [(name, float(case[key]), None) for name, case in cases.items() if key in case]
    if not bars:
        return []
    title = f"{step}: " + ("output tokens per second" if key != "share" else "share of the measured ceiling")
    file = bar_chart(out / f"{step}.svg", title, bars)
    return ["", f"![{title}]({file.name})"]
