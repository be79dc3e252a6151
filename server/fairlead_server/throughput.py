"""`fairlead bench throughput`: tokens per second of one platform, or of several side by side in this process."""

import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fairlead import SamplingParams
from fairlead.errors import ConfigError

if TYPE_CHECKING:
    from fairlead import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every run computes: `num_prompts` random prompts at once. Each repetition draws new ones, from `seed`."""

    num_prompts: int
    input_len: int
    output_len: int
    repeats: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("num_prompts", "input_len", "output_len", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")

    def prompts(self, repetition: int, vocab_size: int) -> list[list[int]]:
        """The same for every platform."""
        draw = random.Random(f"{self.seed} {repetition}")
        return [[draw.randrange(vocab_size) for _ in range(self.input_len)] for _ in range(self.num_prompts)]


def throughput(settings: Mapping[str, Any], load: Load) -> int:
    """Prints the JSON of all runs; the platforms take turns, so that what slows the machine slows all of them.

    `settings` are an LLM's; its platform may be several names with commas between. Returns the exit status.
    """
    from fairlead import LLM  # imports torch

    names: Sequence[str | None] = [name.strip() for name in (settings.get("platform") or "").split(",")]
    names = [name for name in names if name] or [None]
    if len(set(names)) < len(names):
        raise ConfigError(f"--platform names one twice: {settings.get('platform')}")
    engines: list[LLM] = []
    try:
        for name in names:
            base = {"model": "demo", "skip_tokenizer_init": True, "max_num_seqs": load.num_prompts}
            engines.append(LLM(**{**base, **settings, "platform": name}))
        rates: list[list[float]] = [[] for _ in engines]
        for repetition in range(-1, load.repeats):  # the first one warms up
            for engine, found in zip(engines, rates, strict=True):
                rate = _run(engine, load, repetition)
                if repetition >= 0:
                    found.append(rate)
                    print(f"{engine.info.platform}: {rate:.1f} output tok/s", file=sys.stderr)
        print(json.dumps(_report(engines, rates, load), indent=2))
    finally:
        for engine in engines:
            engine.close()
    return 0


def _run(engine: "LLM", load: Load, repetition: int) -> float:
    """Output tokens per second of one repetition."""
    prompts = load.prompts(repetition, engine.info.vocab_size)
    params = SamplingParams(temperature=0, max_tokens=load.output_len, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds


def _report(engines: Sequence["LLM"], rates: Sequence[Sequence[float]], load: Load) -> dict[str, Any]:
    medians = [statistics.median(found) for found in rates]
    both = (load.input_len + load.output_len) / load.output_len
    return {
        "model": engines[0].info.model,
        **asdict(load),
        "platforms": [
            {
                "platform": engine.info.platform,
                "device": engine.info.device,
                "dtype": engine.info.dtype,
                "attention_backend": engine.info.attention_backend,
                "output_tokens_per_s": round(median, 2),
                "total_tokens_per_s": round(median * both, 2),
                "runs": [round(rate, 2) for rate in found],
                "ratio_to_first": round(median / medians[0], 4),
            }
            for engine, found, median in zip(engines, rates, medians, strict=True)
        ],
    }
