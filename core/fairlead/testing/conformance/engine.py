"""Tier 6: the engine on the platform: many steps, batches, chunks, preemption, cached prefixes, memory.

Whatever the scheduler does to a request, its tokens stay what they are alone: all comparisons are with that.
"""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fairlead.config import EngineConfig
from fairlead.engine.builder import build
from fairlead.engine.llm import LLM
from fairlead.errors import ConfigError
from fairlead.request import RequestOutput, SamplingParams
from fairlead.testing.conformance.check import Check, Outcome
from fairlead.testing.conformance.subject import Subject

HOOK = "ops and attention, through LLM.generate"
MAX_LEN = 160
PROMPTS = [list(range(20, 20 + n)) for n in (1, 15, 16, 17, 40, 70)]


def checks(subject: Subject) -> Iterator[Check]:
    """The checks of the tier, all on the embedded model."""
    table: list[tuple[str, Callable[[_Engine], None]]] = [
        ("100 steps", _Engine.many_steps),
        ("a batch equals its requests alone", _Engine.batch),
        ("prompts in chunks", _Engine.chunks),
        ("preemption", _Engine.preemption),
        ("cached prefixes", _Engine.prefixes),
        ("seeded sampling", _Engine.seeds),
        ("log-probabilities", _Engine.logprobs),
        ("two engines in one process", _Engine.two_engines),
        ("memory is accounted for, and given back", _Engine.memory),
    ]
    engine = _Engine(subject)
    for name, look in table:
        yield Check(tier="engine", name=name, hook=HOOK, run=_outcome(look, engine))


def _outcome(look: "Callable[[_Engine], None]", engine: "_Engine") -> Callable[[], Outcome]:
    def run() -> Outcome:
        try:
            look(engine)
        except ConfigError as error:
            return Outcome(status="unsupported", reason=str(error))
        return Outcome()

    return run


class _Engine:
    """Engines of the embedded model on the platform; `alone` is what each prompt gives by itself."""

    def __init__(self, subject: Subject) -> None:
        self.s = subject
        self._alone: list[Sequence[int]] | None = None

    def open(self, **settings: Any) -> LLM:
        """A new engine; float32 where the platform has it, so that equal is equal."""
        dtype = "float32" if "float32" in self.s.dtypes else self.s.dtypes[0]
        base = {"dtype": dtype, "max_model_len": MAX_LEN, "max_num_seqs": 8, "skip_tokenizer_init": True}
        return LLM("demo", **{**base, **self.s.settings, **settings})

    def generate(self, llm: LLM, prompts: list[list[int]], **params: Any) -> list[RequestOutput]:
        """All prompts at once; convicts an output with an error or a wrong number of tokens."""
        wanted = {"temperature": 0.0, "max_tokens": 24, **params}
        given = SamplingParams(ignore_eos=True, detokenize=False, **wanted)
        outputs = llm.generate(prompts, given, use_tqdm=False)
        for output in outputs:
            completion = output.outputs[0]
            failed = output.error or completion.finish_reason == "error"
            self.s.expect(not failed, HOOK, "outputs without an error", output.error or completion.finish_reason)
            num = len(completion.token_ids)
            self.s.expect(num == wanted["max_tokens"], HOOK, f"{wanted['max_tokens']} tokens", num)
        return outputs

    def run(self, prompts: list[list[int]], *, sampling: dict[str, Any] | None = None, **settings: Any) -> list[Any]:
        """The token ids of each prompt, from an engine of its own."""
        llm = self.open(**settings)
        try:
            return [o.outputs[0].token_ids for o in self.generate(llm, prompts, **(sampling or {}))]
        finally:
            llm.close()

    def alone(self) -> list[Sequence[int]]:
        """Computed once."""
        if self._alone is None:
            llm = self.open(enable_prefix_caching=False)
            try:
                self._alone = [self.generate(llm, [prompt])[0].outputs[0].token_ids for prompt in PROMPTS]
            finally:
                llm.close()
        return self._alone

    def expect_equal(self, found: list[Any], what: str) -> None:
        for prompt, got, want in zip(PROMPTS, found, self.alone(), strict=True):
            same = sum(a == b for a, b in zip(got, want, strict=True))
            expected = f"the same {len(want)} tokens {what} as alone, for a prompt of {len(prompt)}"
            self.s.expect(got == want, HOOK, expected, f"{same} equal ones")

    def many_steps(self) -> None:
        self.run(PROMPTS[:3], sampling={"max_tokens": 100})

    def batch(self) -> None:
        self.expect_equal(self.run(PROMPTS), "in a batch")

    def chunks(self) -> None:
        self.expect_equal(self.run(PROMPTS, max_num_batched_tokens=24), "in chunks of 24 tokens")

    def preemption(self) -> None:
        """Blocks for one and a half of the sequences that want to run: they take turns."""
        size = self.s.platform.defaults.block_size
        num_blocks = max(-(-MAX_LEN // size), math.ceil(1.5 * -(-94 // size)))
        self.expect_equal(self.run(PROMPTS, num_blocks=num_blocks + 1), "after preemption")

    def prefixes(self) -> None:
        llm = self.open(enable_prefix_caching=True)
        try:
            for _ in range(2):
                self.expect_equal([o.outputs[0].token_ids for o in self.generate(llm, PROMPTS)], "from a cached prefix")
        finally:
            llm.close()

    def seeds(self) -> None:
        sampling = {"temperature": 1.0, "seed": 7, "top_k": 40, "top_p": 0.95}
        first, again = (self.run(PROMPTS, sampling=sampling) for _ in range(2))
        self.s.expect(first == again, HOOK, "the same tokens from the same seed", "others")

    def logprobs(self) -> None:
        llm = self.open()
        try:
            outputs = self.generate(llm, PROMPTS, logprobs=2, prompt_logprobs=1, max_tokens=4)
        finally:
            llm.close()
        for output in outputs:
            rows = [*(output.prompt_logprobs or ())[1:], *(output.outputs[0].logprobs or ())]
            values = [entry.logprob for row in rows if row is not None for entry in row.values()]
            expected = "log-probabilities that are numbers of at most 0"
            self.s.expect(all(v <= 1e-6 and math.isfinite(v) for v in values), HOOK, expected, f"{max(values):.3g}")

    def two_engines(self) -> None:
        first, second = self.open(), self.open()
        try:
            for _ in range(2):
                found = [o.outputs[0].token_ids for o in self.generate(first, PROMPTS)]
                self.expect_equal(found, "beside another engine")
                self.generate(second, [prompt[::-1] for prompt in PROMPTS])
        finally:
            first.close()
            second.close()

    def memory(self) -> None:
        config = EngineConfig.of(model="demo", max_model_len=MAX_LEN, max_num_seqs=4, **self.s.settings)
        as_given = EngineConfig.of(model="demo", max_model_len=MAX_LEN, max_num_seqs=4, **self.s.settings)
        built = build(config)
        info, allocator = built.plan.info, built.plan.platform.allocator
        weights, cache = allocator.allocated_bytes("weights"), allocator.allocated_bytes("kv_cache")
        self.s.expect(config == as_given, "create", "a config that nobody has changed", "a change")
        hook = "allocator.allocated_bytes"
        self.s.expect(weights > 0, hook, "weights under the tag 'weights'", weights)
        padding = sum(b.block_bytes() for b in built.plan.backends) if built.plan.graph_runner.buckets else 0
        most = info.kv_cache_bytes + padding
        self.s.expect(0 < cache <= most, hook, f"a cache of at most the planned {most} bytes", cache)
        del built
        gc.collect()
        left = {tag: allocator.allocated_bytes(tag) for tag in ("weights", "kv_cache")}
        self.s.expect(not any(left.values()), hook, "nothing left once the engine is gone", left)
