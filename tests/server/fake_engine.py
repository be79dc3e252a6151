"""An engine process without a model: it repeats its prompt. Run as a script in place of fairlead.engine.process.

The first token of a prompt can ask for trouble (RAISE and the others), and so can the setting `revision` (see `load`).
"""

import os
import signal
import sys
import time
from dataclasses import dataclass

from fairlead import errors
from fairlead.config import EngineConfig
from fairlead.engine.process import main
from fairlead.request import (
    EngineInfo,
    EngineStats,
    FinishReason,
    Request,
    SequenceDelta,
    TokenLogprobs,
)

STEP_S = 0.005
VOCAB_SIZE, MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS = 1024, 256, 16, 64
RAISE, HANG, REJECT, NAN, DIE = range(1000, 1005)


@dataclass
class Running:
    """One sequence in flight."""

    request: Request
    index: int
    num_output: int = 0


class FakeEngine:
    """Each step gives every sequence its prompt's next token, over and over."""

    def __init__(self, config: EngineConfig, step_s: float = STEP_S) -> None:
        self._step_s = step_s
        self.info = EngineInfo(
            model=config.model.model,
            platform="fake",
            device="fake:0",
            attention_backend="none",
            dtype="float32",
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=config.scheduler.max_num_seqs,
            block_size=BLOCK_SIZE,
            num_blocks=NUM_BLOCKS,
            weights_bytes=0,
            kv_cache_bytes=0,
        )
        self._running: list[Running] = []
        self._waiting: list[Request] = []
        self._started: list[str] = []
        self._max_num_seqs = config.scheduler.max_num_seqs
        self._num_prompt_tokens = self._num_generation_tokens = self._num_steps = 0
        self._num_scheduled_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add_request(self, request: Request) -> None:
        if request.prompt_token_ids[0] == REJECT:
            raise errors.RequestError("the fake engine takes no such prompt", param="prompt")
        self._waiting.append(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._running = [r for r in self._running if r.request.request_id != request_id or index not in (None, r.index)]
        self._waiting = [r for r in self._waiting if r.request_id != request_id]

    def step(self) -> list[SequenceDelta]:
        time.sleep(self._step_s)
        self._num_steps += 1
        while self._waiting and len(self._running) + self._waiting[0].params.num_sequences <= self._max_num_seqs:
            request = self._waiting.pop(0)
            self._started.append(request.request_id)
            self._num_prompt_tokens += len(request.prompt_token_ids)
            self._running += [Running(request, index) for index in range(request.params.num_sequences)]
        self._num_scheduled_tokens += len(self._running)
        deltas = [self._advance(running) for running in self._running]
        ended = {(d.request_id, d.index) for d in deltas if d.finish_reason is not None}
        self._running = [r for r in self._running if (r.request.request_id, r.index) not in ended]
        return deltas

    def take_started(self) -> list[str]:
        started, self._started = self._started, []
        return started

    def take_rejected(self) -> list[tuple[str, errors.RequestError]]:
        return []

    def _advance(self, running: Running) -> SequenceDelta:
        prompt, params = running.request.prompt_token_ids, running.request.params
        start = 40 if prompt[0] == NAN else 1  # trouble comes after the first token, in a stream well after it
        fault = prompt[0] if running.num_output >= start else None
        if fault == RAISE:
            raise RuntimeError("the fake engine was told to fail")
        if fault == HANG:
            time.sleep(3600)
        if fault == DIE:
            os.kill(os.getpid(), signal.SIGKILL)
        token_id = prompt[running.num_output % len(prompt)]
        running.num_output += 1
        self._num_generation_tokens += 1
        reason = FinishReason.LENGTH if running.num_output == params.max_tokens else None
        if token_id in params.stop_token_ids:
            reason = FinishReason.STOP
        logprobs: tuple[TokenLogprobs, ...] = ()
        if params.logprobs is not None or params.is_ranked:
            logprobs = (some_logprobs(token_id, params.logprobs or 0, -9.5 + running.index),)
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if params.prompt_logprobs is not None and (running.index, running.num_output) == (0, 1):
            prompt_logprobs = tuple(some_logprobs(i, params.prompt_logprobs, -7.5) for i in prompt[1:])
        return SequenceDelta(
            request_id=running.request.request_id,
            index=running.index,
            token_ids=(token_id,),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            finish_reason=FinishReason.ERROR if fault == NAN else reason,
            stop_reason=token_id if reason is FinishReason.STOP else None,
            error="the logits of the fake engine are NaN" if fault == NAN else None,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=len({r.request.request_id for r in self._running}),
            num_requests_waiting=len(self._waiting),
            kv_cache_usage=min(len(self._running) / NUM_BLOCKS, 1.0),
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            num_steps=self._num_steps,
            num_scheduled_tokens=self._num_scheduled_tokens,
        )

    def close(self) -> None:
        self._running = []


def some_logprobs(token_id: int, num_best: int, value: float) -> TokenLogprobs:
    best = tuple(range(500, 500 + num_best))
    values = tuple(-float(i) for i in range(len(best)))
    return TokenLogprobs(token_ids=(token_id, *best), logprobs=(value, *values), rank=30)


def load(config: EngineConfig) -> FakeEngine:
    """`revision` may name an exception to raise, or "slow" (steps), "sleep" or "die"."""
    match config.model.revision:
        case None:
            step_s = float(sys.argv[1]) / 1000 if len(sys.argv) > 1 else STEP_S  # benchmarks ask for less
            return FakeEngine(config, step_s=step_s)
        case "slow":
            return FakeEngine(config, step_s=0.1)
        case "sleep":
            time.sleep(3600)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "PluginContractError":
            raise errors.PluginContractError(plugin="acme", hook="create", expected="a Platform", got="None")
        case name:
            raise getattr(errors, name, RuntimeError)("the fake engine cannot load")
    raise AssertionError("unreachable")


if __name__ == "__main__":
    sys.exit(main(load))
