"""The engine: one loop over scheduler and model runner."""

import random
from collections.abc import Callable
from dataclasses import replace

from fairlead import plugins
from fairlead.checkpoint import Checkpoint
from fairlead.config import EngineConfig, SchedulerConfig
from fairlead.engine.beam_search import BeamSearches
from fairlead.engine.builder import build
from fairlead.engine.pipeline import Pipeline, RunningStep, SamplingInputs
from fairlead.engine.step_profile import StepProfile, profile_steps
from fairlead.errors import ConfigError, RequestError
from fairlead.interface import SchedulingPolicy
from fairlead.request import EngineInfo, EngineStats, Request, SequenceDelta
from fairlead.sampling.structured.backend import Vocabulary, backend_names
from fairlead.sampling.structured.compiler import Compiler
from fairlead.sampling.structured.params import StructuredOutputParams, spec_error
from fairlead.sampling.structured.policy import StructuredOutputs
from fairlead.scheduling.block_manager import BlockManager
from fairlead.scheduling.policy import FirstComeFirstServed, Priority
from fairlead.scheduling.scheduler import Scheduler
from fairlead.tokenization.tokenizer import load_tokenizer


class EngineCore:
    """Token ids in, token ids out. Not thread-safe: one thread drives it with `step`."""

    def __init__(self, config: EngineConfig) -> None:
        """Loads the model; see `builder.build` for what can be raised."""
        built = build(config)
        plan, settings = built.plan, built.plan.settings
        self.info: EngineInfo = plan.info
        self.op_providers = plan.op_providers
        self._runner, self._ops, self._synchronize = built.runner, plan.context.ops, plan.platform.synchronize
        self._pipeline = Pipeline(built.runner, is_async=settings.async_scheduling)
        self._in_flight: RunningStep | None = None
        blocks = BlockManager(
            plan.cache_groups,
            settings.block_size,
            max_chunk=settings.max_num_batched_tokens,
            enable_prefix_caching=config.cache.enable_prefix_caching,
            swap_costs=built.swap_costs,
        )
        self.scheduler = Scheduler(
            blocks,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=settings.max_model_len,
            policy=_policy(config.scheduler),
            long_prefill_token_threshold=config.scheduler.long_prefill_token_threshold,
        )
        self._beams = BeamSearches(self.scheduler)
        self._seeds = random.Random(config.model.seed)
        self._grammar_backends = backend_names(config.model.structured_outputs_backend)
        self._has_tokenizer = not config.model.skip_tokenizer_init
        compiler = Compiler(self._grammar_backends, lambda: _vocabulary(config, plan.checkpoint, self.info.vocab_size))
        self._structured = StructuredOutputs(compiler, self.scheduler, max_admitted=2 * settings.max_num_seqs)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or self._structured.num_held > 0 or self._in_flight is not None

    def add_request(self, request: Request) -> None:
        """Queues a request. Raises RequestError if it can never run, ValueError if its id is in use.

        A request with structured outputs waits until its grammar is compiled; if that fails, `take_rejected` tells.
        """
        info = self.info
        request.check(max_model_len=info.max_model_len, vocab_size=info.vocab_size, max_num_seqs=info.max_num_seqs)
        if self._structured.holds(request.request_id):
            raise ValueError(f"request id {request.request_id!r} is in use")
        for processor in request.params.logits_processors:
            if isinstance(processor, str):
                plugins.load_logits_processor(processor)
        seed = request.params.seed
        seed = self._seeds.getrandbits(64) if seed is None else seed % 2**64
        if request.params.structured_outputs is not None:
            self._check_structured()
            self._structured.submit(request, seed)
        elif request.params.use_beam_search:
            self._beams.add(request, seed)
        else:
            self.scheduler.add(request, seed)

    def prepare_structured(self) -> None:
        """Starts, in the background, what a first structured output would wait for; for servers."""
        self._structured.compiler.warm_up()

    def check_structured(self, spec: StructuredOutputParams) -> None:
        """Waits, some seconds at most, until it is known that the grammar compiles. Raises RequestError if not."""
        self._check_structured()
        self._structured.compiler.check(spec)

    def take_rejected(self) -> list[tuple[str, RequestError]]:
        """Requests that were queued and turned out never to run, with the reason; each is told once."""
        return self._structured.take_rejected()

    def take_started(self) -> list[str]:
        """Requests that a step has taken up for the first time; each is told once."""
        # A search of beams is taken up with the first of its sequences, whose ids stand behind its own.
        return [id.removesuffix("/0") for id in self.scheduler.take_started()]

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request (or one of its sequences) without a delta; does nothing if it is over."""
        self.scheduler.abort(request_id, index)
        if index is None:
            self._beams.abort(request_id)
        self._structured.abort(request_id)

    def step(self) -> list[SequenceDelta]:
        """Starts one step and ends one; returns what that added to each sequence. Call only while `has_work`.

        With asynchronous scheduling it is the step before that ends, while the new one runs: the first call returns
        nothing. If the platform raises, every request is ended, the cache is forgotten, and the error goes on.
        """
        for request, seed in self._structured.admit():
            self.scheduler.add(request, seed)
        if not self.scheduler.has_work and self._in_flight is None:
            self._structured.wait()
            return []
        try:
            return self._step()
        except BaseException:  # Ctrl-C too: no request may stay behind half computed
            self._end_all()
            raise

    def _step(self) -> list[SequenceDelta]:
        batch = self.scheduler.schedule()
        running, self._in_flight = self._in_flight, self._pipeline.launch(batch) if batch.chunks else None
        deltas = self._take(running) if running is not None else []
        started = self._in_flight
        if started is not None:
            contexts = self.scheduler.sample_contexts(started.batch)
            bitmask = self._structured.begin(started.batch)
            started.sampling.set_result(SamplingInputs(contexts=contexts, bitmask=bitmask))
            if not self._pipeline.is_async:
                self._in_flight = None
                deltas = self._take(started)
        return self._beams.take(deltas) if self._beams else deltas

    def _take(self, step: RunningStep) -> list[SequenceDelta]:
        """Waits for a step and takes in what it gave."""
        result, bitmask = self._pipeline.wait(step), step.sampling.result().bitmask
        sampled = result.sampled if bitmask is None else self._structured.advance(bitmask, result.sampled)
        deltas = self.scheduler.update(step.batch, sampled, result.prompt_logprobs)
        self._structured.forget(deltas)
        return deltas

    def _end_all(self) -> None:
        self._in_flight = None
        self._pipeline.discard()
        self.scheduler.abort_all()
        self._beams.clear()
        self._structured.abort_all()

    def stats(self) -> EngineStats:
        """Counters and gauges as of now."""
        stats = self.scheduler.stats()
        return replace(stats, num_requests_waiting=stats.num_requests_waiting + self._structured.num_held)

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; requests that run keep their blocks. Always True."""
        self.scheduler.blocks.reset_cache()
        return True

    def profile(self, work: Callable[[], object]) -> StepProfile:
        """Runs the work, which steps this engine, and tells where the time of its steps went, by op.

        Raises ConfigError where steps are asynchronous: they overlap with what is counted as outside of them.
        """
        if self._pipeline.is_async:
            raise ConfigError("steps that overlap cannot be profiled; set async_scheduling=False")
        return profile_steps(self._runner, self._ops, self._synchronize, work)

    def close(self) -> None:
        """Ends every request and lets go of the model and its cache."""
        self._end_all()
        self._pipeline.close()
        self._structured.close()
        del self._runner, self._pipeline

    def _check_structured(self) -> None:
        if not self._has_tokenizer:
            raise spec_error("the model was loaded without a tokenizer, so no grammar can be compiled")
        if not self._grammar_backends:
            raise spec_error("no grammar library is installed; pip install llguidance")


def _policy(config: SchedulerConfig) -> SchedulingPolicy:
    if config.scheduling_policy == "fcfs":
        return FirstComeFirstServed()
    if config.scheduling_policy == "priority":
        return Priority(aging_s=config.priority_aging_s)
    return plugins.create_scheduling_policy(config.scheduling_policy)


def _vocabulary(config: EngineConfig, checkpoint: Checkpoint, vocab_size: int) -> Vocabulary:
    tokenizer = load_tokenizer(config.model.tokenizer or checkpoint.directory, revision=config.model.revision)
    return Vocabulary.of(tokenizer, vocab_size, (*checkpoint.eos_token_ids, *tokenizer.eos_token_ids))
