"""What Fairlead is out to reach on a CPU, as ratios between figures of one run."""

from dataclasses import dataclass

from comparing import workloads

Medians = dict[str, dict[str, float]]
"""By engine and by "workload metric"."""


@dataclass(frozen=True, slots=True)
class Target:
    """`ours` is at least so many times as good as the best of `others` that was measured; on every model if it names
    none."""

    key: str
    ours: str
    others: tuple[str, ...]
    at_least: float
    model: str | None = None


W1, W2, W3, W4 = "w1 output_tokens_per_s", "w2 itl_ms", "w3 prefill_tokens_per_s", "w4 wall_s"
INT8, LLAMA = ("vllm-int8", "openvino-int8"), ("llamacpp", "llamacpp-q8_0", "llamacpp-q4_0")
TARGETS = (
    Target(W1, "fairlead", ("vllm",), 1.3, "smol135m"),
    Target(W1, "fairlead", ("vllm",), 1.12, "qwen05b"),
    Target(W1, "fairlead", ("transformers",), 24, "smol135m"),
    Target(W2, "fairlead", ("limit",), 1 / 1.15),
    Target(W2, "fairlead", ("llamacpp",), 1.2, "smol135m"),
    Target(W2, "fairlead", ("vllm",), 1.8, "smol135m"),
    Target(W2, "fairlead", ("llamacpp", "vllm"), 1.0, "qwen05b"),
    Target(W2, "fairlead", ("llamacpp", "vllm"), 1.0, "llama1b"),
    Target(W2, "fairlead-int4", ("llamacpp-q4_0",), 1.0),
    Target(W3, "fairlead", ("limit",), 0.8),
    Target(W3, "fairlead", ("openvino",), 1.0),
    Target(W4, "fairlead", ("vllm",), 1.6, "smol135m"),
    Target(W4, "fairlead", ("vllm",), 1.2, "qwen05b"),
    Target(W1, "fairlead-int8", ("fairlead",), 1.7, "smol135m"),
    Target(W1, "fairlead-int8", ("fairlead",), 1.5, "qwen05b"),
    Target(W1, "fairlead-int8", INT8, 1.9, "smol135m"),
    Target(W1, "fairlead-int8", INT8, 1.4, "qwen05b"),
    Target(W1, "fairlead-int8", LLAMA, 3.0),
)


def ratio(key: str, ours: float, others: list[float]) -> float:
    """How many times as good as the best of the others, whichever way the metric points."""
    if key.split()[1] in workloads.LOWER_IS_BETTER:
        return min(others) / ours
    return ours / max(others)


def table(model: str, medians: Medians) -> list[str]:
    """A line in Markdown for each target of the model whose engines have figures; empty if none have."""
    lines = []
    for target in TARGETS:
        ours = medians.get(target.ours, {}).get(target.key)
        others = {name: medians[name][target.key] for name in target.others if target.key in medians.get(name, ())}
        if target.model in (None, model) and ours is not None and others:
            reached = ratio(target.key, ours, list(others.values()))
            verdict = "yes" if reached >= target.at_least else "no"
            names = f"{target.key} | {target.ours} | {', '.join(others)}"
            lines.append(f"| {names} | {target.at_least:.2f} x | {reached:.2f} x | {verdict} |")
    head = ["| | | to the best of | target | measured | reached |", "|---|---|---|---|---|---|"]
    return head + lines if lines else []
