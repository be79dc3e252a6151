"""Two platforms side by side in one process: the tokens and log-probabilities of the embedded model on both."""

from collections.abc import Iterator
from dataclasses import dataclass

from fairlead.engine.llm import LLM
from fairlead.request import SamplingParams
from fairlead.testing.conformance.check import AGAINST, Check, Outcome
from fairlead.testing.conformance.subject import Subject

PROMPTS = [list(range(30, 30 + n)) for n in (2, 16, 33, 100)]
NUM_NEW = 32
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.1}
"""Largest difference of a log-probability. Two platforms in a narrow dtype round in different places."""
HOOK = "ops and attention, through LLM.generate"


def checks(subject: Subject, other: Subject) -> Iterator[Check]:
    """One per dtype that both have."""
    dtypes = [dtype for dtype in subject.dtypes if dtype in other.dtypes]
    if not dtypes:
        subject.fail("capabilities.dtypes", f"one that {other.name!r} has too: {other.dtypes}", subject.dtypes)
    for dtype in dtypes:
        name = f"demo, {subject.name} against {other.name}, {dtype}"
        yield Check(tier=AGAINST, name=name, hook=HOOK, run=_Comparison(subject, other, dtype).run)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """Both engines stand at the same time, and take turns."""

    subject: Subject
    other: Subject
    dtype: str

    def run(self) -> Outcome:
        """Log-probabilities of given texts, so that a token that differs does not change what follows; then tokens."""
        ours, theirs = self._open(self.subject), self._open(self.other)
        try:
            errors = [self._difference(ours, theirs, prompt) for prompt in PROMPTS]
            num_equal = sum(self._num_equal(ours, theirs, prompt) for prompt in PROMPTS)
        finally:
            ours.close()
            theirs.close()
        worst, tolerance, total = max(errors), TOLERANCE[self.dtype], len(PROMPTS) * NUM_NEW
        expected = f"log-probabilities of {self.other.name!r} within {tolerance:g}"
        self.subject.expect(worst <= tolerance, HOOK, expected, f"{worst:.2e}")
        if self.dtype == "float32":
            expected = f"the {total} greedy tokens of {self.other.name!r}"
            self.subject.expect(num_equal == total, HOOK, expected, f"{num_equal} of them")
        return Outcome(reason=f"{num_equal} of {total} greedy tokens equal", error=worst, tolerance=tolerance)

    def _open(self, subject: Subject) -> LLM:
        return LLM("demo", dtype=self.dtype, max_model_len=160, skip_tokenizer_init=True, **subject.settings)

    def _difference(self, ours: LLM, theirs: LLM, prompt: list[int]) -> float:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        pair = [llm.generate(prompt, params, use_tqdm=False)[0].prompt_logprobs for llm in (ours, theirs)]
        assert pair[0] is not None
        assert pair[1] is not None
        worst = 0.0
        for token_id, a, b in zip(prompt[1:], pair[0][1:], pair[1][1:], strict=True):
            assert a is not None
            assert b is not None
            worst = max(worst, abs(a[token_id].logprob - b[token_id].logprob))
        return worst

    def _num_equal(self, ours: LLM, theirs: LLM, prompt: list[int]) -> int:
        params = SamplingParams(max_tokens=NUM_NEW, temperature=0, ignore_eos=True, detokenize=False)
        a, b = (llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for llm in (ours, theirs))
        return sum(x == y for x, y in zip(a, b, strict=True))
