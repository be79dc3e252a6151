"""Step 5: one long prompt, from its request to its first token."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fairlead.engine.engine import EngineCore
from gpubench import synthetic
from gpubench.engines import opened, requests, runner_of
from gpubench.harness import Card, Case, Settings, profiled
from gpubench.models import config_of, prefill_ops

GROUPS = ("llama8b", "qwen8b", "llama1b")
LENGTHS = (8192, 2048)


def cases(settings: Settings, group: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    """One model at every length."""
    card = Card(settings)
    card.measure_ceilings()
    with opened(settings, group) as engine:
        for length in settings.pick(LENGTHS, (8192,)):
            yield f"{group}, {length}", partial(prefill, card, engine, group, settings.pick(length, 100))


def prefill(card: Card, engine: EngineCore, model: str, length: int) -> Case:
    """Shares of the matmul rate: of the engine's whole work, and of the forward pass alone."""
    ops = prefill_ops(config_of(model, is_tiny=card.settings.is_tiny), length)
    found = []
    for _ in range(card.settings.pick(6, 2)):
        (request,) = requests(1, length, engine.info.vocab_size)
        engine.add_request(request)
        start = time.perf_counter()
        while not engine.step():
            pass
        found.append(time.perf_counter() - start)
        engine.abort(request.request_id)
        while engine.has_work:
            engine.step()
    first_token_s = statistics.median(found[1:])
    forward_s, work = forward_time(card, engine, length)
    profiled(card, work, card.settings.out / "profiles" / f"prefill_{model}_{length}.txt")
    return {
        "first_token_s": first_token_s,
        "forward_s": forward_s,
        "ops": ops,
        "tokens_per_s": length / first_token_s,
        "share": ops / first_token_s / card.matmul_ops_per_s,
        "forward_share": ops / forward_s / card.matmul_ops_per_s,
    }


@torch.inference_mode()
def forward_time(card: Card, engine: EngineCore, length: int) -> tuple[float, Callable[[], object]]:
    """Seconds of the forward pass and one row of logits, back to back; and one to profile."""
    runner = runner_of(engine)
    size, groups = engine.info.block_size, len(runner.backends)
    batch = synthetic.scheduled_step(1, length, length, size, engine.info.vocab_size, num_groups=groups)
    prepared = runner.prepare(batch)

    def work(i: int = 0) -> object:
        return runner.padded.logits(runner.forward(prepared)[prepared.inputs.sample_rows_R])

    return card.time(work, is_graphed=False).median_s, work
