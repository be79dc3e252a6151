"""Step 4: whole decode steps, and what of them is Python.

Two clocks: `step_s` is what a step of the engine takes, scheduler, sampler and all, as a user sees it. `device_s` is
what forward pass and logits take when they are asked for again and again without waiting, which is the device's own
time wherever graphs are replayed. The difference is overhead that the device waits for.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fairlead.engine.engine import EngineCore
from gpubench import synthetic
from gpubench.engines import decode_bytes, opened, requests, runner_of
from gpubench.harness import Card, Case, Settings, profiled
from gpubench.models import config_of

GROUPS = ("llama8b", "llama1b", "qwen1b", "qwen8b")
BATCHES = (1, 8, 64, 256)
CONTEXTS = (128, 2048, 8192)
MAX_PROMPT_TOKENS = 140_000  # to compute for one case; longer ones have the device's time alone
PROFILED = (1, 128), (64, 2048)


def cases(settings: Settings, group: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    """One model at every number of sequences and length of context."""
    card = Card(settings)
    card.measure_ceilings()
    with opened(settings, group) as engine:
        for context in settings.pick(CONTEXTS, (128,)):
            for num_seqs in settings.pick(BATCHES, (1, 3)):
                yield f"{group}, {num_seqs} x {context}", partial(decode, card, engine, group, num_seqs, context)


def decode(card: Card, engine: EngineCore, model: str, num_seqs: int, context: int) -> Case:
    """Shares are of the copy bandwidth, over the bytes that must move."""
    settings, block_size = card.settings, engine.info.block_size
    context = settings.pick(context, 32)
    needed = synthetic.blocks_needed(num_seqs, context + 64, block_size)
    if needed >= engine.info.num_blocks:
        return {"skipped": f"needs {needed} KV blocks, and the card has room for {engine.info.num_blocks}"}
    itemsize = settings.torch_dtype.itemsize
    moved = decode_bytes(config_of(model, is_tiny=settings.is_tiny), itemsize, num_seqs, context)
    device_s, host_s, replay = device_time(card, engine, num_seqs, context)
    found: Case = {"device_s": device_s, "host_s": host_s, "bytes": moved}
    found["device_share"] = moved / device_s / card.copy_bytes_per_s
    if num_seqs * context <= MAX_PROMPT_TOKENS:
        step_s = engine_step_time(card, engine, num_seqs, context)
        found |= {"step_s": step_s, "overhead_us": (step_s - device_s) * 1e6}
        found["share"] = moved / step_s / card.copy_bytes_per_s
        found["tokens_per_s"] = num_seqs / step_s
    if (num_seqs, context) in settings.pick(PROFILED, ((1, 32),)):
        profiled(card, replay, settings.out / "profiles" / f"decode_{model}_{num_seqs}x{context}.txt")
    return found


@torch.inference_mode()
def device_time(
    card: Card, engine: EngineCore, num_seqs: int, context: int
) -> tuple[float, float, Callable[[], object]]:
    """Seconds of forward pass and logits, back to back; of the host until it has asked for one; and one to profile."""
    runner = runner_of(engine)
    size, groups = engine.info.block_size, len(runner.backends)
    batch = synthetic.scheduled_step(num_seqs, 1, context, size, engine.info.vocab_size, num_groups=groups)
    prepared = runner.prepare(batch)

    def work(i: int = 0) -> object:
        return runner.padded.logits(runner.forward(prepared)[prepared.inputs.sample_rows_R])

    device_s = card.time(work, is_graphed=False).median_s
    host = []
    for _ in range(card.settings.pick(20, 2)):
        card.platform.synchronize()
        start = time.perf_counter()
        again = runner.prepare(batch)
        runner.padded.logits(runner.forward(again)[again.inputs.sample_rows_R])
        host.append(time.perf_counter() - start)
    return device_s, statistics.median(host), work


def engine_step_time(card: Card, engine: EngineCore, num_seqs: int, context: int) -> float:
    """Median seconds of a step of the whole engine, once all sequences decode."""
    num_steps = card.settings.pick(32, 4)
    asked = requests(num_seqs, context - num_steps // 2, engine.info.vocab_size)
    for request in asked:
        engine.add_request(request)
    counts = {request.request_id: 0 for request in asked}
    seconds: list[float] = []
    while len(seconds) < num_steps:
        all_decode = min(counts.values()) > 2
        start = time.perf_counter()
        for delta in engine.step():
            counts[delta.request_id] += len(delta.token_ids)
        if all_decode:
            seconds.append(time.perf_counter() - start)
    for request in asked:
        engine.abort(request.request_id)
    while engine.has_work:
        engine.step()
    return statistics.median(seconds)
