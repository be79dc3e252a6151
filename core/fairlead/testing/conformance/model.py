"""Tier 5: whole models of random weights on the platform, against transformers' own on the host."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from fairlead.engine.llm import LLM
from fairlead.errors import ConfigError
from fairlead.request import SamplingParams
from fairlead.testing.conformance.check import Check, Outcome
from fairlead.testing.conformance.subject import NO_ARITHMETIC, Subject
from fairlead.testing.reference import TOLERANCE, Reference, open_llm, prompts_for
from fairlead.testing.tiny_checkpoint import write_tiny_checkpoint

FAMILIES: dict[str, str] = {
    "llama": "grouped heads, rotary, gated feed-forward",
    "gemma2": "sliding windows, soft caps",
    "mixtral": "experts",
    "gpt_neox": "layer norm, partial rotary",
}
MORE_FAMILIES = {"bloom": "ALiBi", "phi3": "merged projections", "qwen3": "norms on queries and keys"}
NUM_NEW = 12
NARROW_TOLERANCE = 2.0
"""Mean error of log-probabilities in a narrow dtype, over that of transformers in the same dtype: how much a rounding
error grows depends on the weights."""


def checks(subject: Subject) -> Iterator[Check]:
    """One per family and dtype: every token in float32, mean log-probabilities in narrower ones."""
    families = FAMILIES | MORE_FAMILIES if subject.full else FAMILIES
    for family, what in families.items():
        for dtype in subject.dtypes:
            run = _unless_unsupported(subject, _Model(subject, family, dtype).run)
            yield Check(tier="model", name=f"{family} ({what}), {dtype}", hook="ops and attention", run=run)


def _unless_unsupported(subject: Subject, run: Callable[[], Outcome]) -> Callable[[], Outcome]:
    def found() -> Outcome:
        if not subject.platform.capabilities.computes:
            return Outcome(status="unsupported", reason=NO_ARITHMETIC)
        try:
            return run()
        except ConfigError as error:
            return Outcome(status="unsupported", reason=str(error))

    return found


class _Model:
    """One family in one dtype."""

    def __init__(self, subject: Subject, family: str, dtype: str) -> None:
        self.s, self.family, self.dtype = subject, family, dtype

    def run(self) -> Outcome:
        """Generates, and compares."""
        sizes = self.s.platform.capabilities.head_sizes
        settings: dict[str, Any] = {}
        if sizes and 16 not in sizes:  # that of the tiny models
            size = min(sizes)
            settings = {"head_dim": size, "hidden_size": 4 * size} if self.family != "gpt_neox" else {}
            settings |= {"hidden_size": 4 * size}
        hide_bars: Callable[[], None] = transformers.utils.logging.disable_progress_bar
        hide_bars()
        with tempfile.TemporaryDirectory() as folder:
            directory = write_tiny_checkpoint(Path(folder), self.family, settings=settings)
            if self.dtype == "float32":
                return self._every_token(directory)
            return self._mean_logprob(directory)

    def _every_token(self, directory: Path) -> Outcome:
        reference, prompts = Reference.of_transformers(directory), prompts_for(512, 6, 40)
        params = SamplingParams(max_tokens=NUM_NEW, temperature=0, logprobs=0, ignore_eos=True, detokenize=False)
        llm = open_llm(directory, 64, **self.s.settings)
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        finally:
            llm.close()
        try:
            for output in outputs:
                reference.check(output)
        except AssertionError as error:
            expected = f"the greedy tokens of {self.family} by transformers, log-probabilities within {TOLERANCE:g}"
            what = str(error).split("\n", 1)[0]  # pytest, where it rewrites our assertions, appends its own account
            self.s.fail("ops and attention, through LLM.generate", expected, what)
        return Outcome(error=reference.worst_logprob, tolerance=TOLERANCE)

    def _mean_logprob(self, directory: Path) -> Outcome:
        prompts = prompts_for(512, 6, 40)[1:]
        exact = _host_logprobs(directory, "float32", prompts)
        own = float((_host_logprobs(directory, self.dtype, prompts) - exact).abs().mean())
        error = float((self._logprobs(directory, prompts) - exact).abs().mean()) / own
        if not error <= NARROW_TOLERANCE:  # NaN too
            expected = f"log-probabilities of {self.family} within {NARROW_TOLERANCE:g} times {own:.2e} on average"
            self.s.fail("ops and attention, through LLM.generate", expected, f"{error:.2f} times that")
        return Outcome(error=error, tolerance=NARROW_TOLERANCE)

    def _logprobs(self, directory: Path, prompts: list[list[int]]) -> torch.Tensor:
        """Of all prompts' tokens but the first ones, on the platform."""
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, ignore_eos=True, detokenize=False)
        llm = LLM(str(directory), dtype=self.dtype, skip_tokenizer_init=True, max_model_len=64, **self.s.settings)
        try:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        finally:
            llm.close()
        found = []
        for prompt, output in zip(prompts, outputs, strict=True):
            for token_id, entry in zip(prompt[1:], (output.prompt_logprobs or ())[1:], strict=True):
                assert entry is not None
                found.append(entry[token_id].logprob)
        return torch.tensor(found)


def _host_logprobs(directory: Path, dtype: str, prompts: list[list[int]]) -> torch.Tensor:
    """The same, by transformers on the host."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            logprobs_TV = model(torch.tensor([prompt]), use_cache=False).logits[0].float().log_softmax(-1)
            found.append(logprobs_TV[:-1].gather(1, torch.tensor(prompt[1:])[:, None]).flatten())
    return torch.cat(found)
