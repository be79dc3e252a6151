"""The engine: one loop over scheduler and model runner."""

import random

from fairlead import plugins
from fairlead.config import EngineConfig
from fairlead.engine.beam_search import BeamSearches
from fairlead.engine.builder import build
from fairlead.request import EngineInfo, EngineStats, Request, SequenceDelta
from fairlead.scheduling.block_manager import BlockManager
from fairlead.scheduling.scheduler import Scheduler


class EngineCore:
    """Token ids in, token ids out. Not thread-safe: one thread drives it with `step`."""

    def __init__(self, config: EngineConfig) -> None:
        """Loads the model; see `builder.build` for what can be raised."""
        built = build(config)
        plan, settings = built.plan, built.plan.settings
        self.info: EngineInfo = plan.info
        self.op_providers = plan.op_providers
        self._runner = built.runner
        blocks = BlockManager(
            plan.cache_groups,
            settings.block_size,
            max_chunk=settings.max_num_batched_tokens,
            enable_prefix_caching=config.cache.enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            blocks,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=settings.max_model_len,
        )
        self._beams = BeamSearches(self.scheduler)
        self._seeds = random.Random(config.model.seed)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def add_request(self, request: Request) -> None:
        """Queues a request. Raises RequestError if it can never run, ValueError if its id is in use."""
        info = self.info
        request.check(max_model_len=info.max_model_len, vocab_size=info.vocab_size, max_num_seqs=info.max_num_seqs)
        for processor in request.params.logits_processors:
            if isinstance(processor, str):
                plugins.load_logits_processor(processor)
        seed = request.params.seed
        add = self._beams.add if request.params.use_beam_search else self.scheduler.add
        add(request, self._seeds.getrandbits(64) if seed is None else seed % 2**64)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request (or one of its sequences) without a delta; does nothing if it is over."""
        self.scheduler.abort(request_id, index)
        if index is None:
            self._beams.abort(request_id)

    def step(self) -> list[SequenceDelta]:
        """Runs one step; returns what it added to each sequence. Call only while `has_work`.

        If the platform raises, every request is ended, the cache is forgotten, and the error goes on.
        """
        batch = self.scheduler.schedule()
        try:
            result = self._runner.execute(batch)
        except BaseException:  # Ctrl-C too: no request may stay behind half computed
            self.scheduler.abort_all()
            self._beams.clear()
            raise
        deltas = self.scheduler.update(batch, result.sampled, result.prompt_logprobs)
        return self._beams.take(deltas) if self._beams else deltas

    def stats(self) -> EngineStats:
        """Counters and gauges as of now."""
        return self.scheduler.stats()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; requests that run keep their blocks. Always True."""
        self.scheduler.blocks.reset_cache()
        return True

    def close(self) -> None:
        """Ends every request and lets go of the model and its cache."""
        self.scheduler.abort_all()
        self._beams.clear()
        del self._runner
