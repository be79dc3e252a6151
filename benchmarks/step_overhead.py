"""Prints what one decode step costs in Python outside the model's forward pass, part by part.

    python benchmarks/step_overhead.py --num-seqs 64

A step is taken apart here exactly as ModelRunner.execute puts it together; each part's median over the steps is
printed. Aim: schedule + build + plan + sampling parameters + update below 3 ms for 64 running sequences.
"""

import argparse
import itertools
import statistics
import time
from collections import defaultdict

import torch

from fairlead.config import EngineConfig
from fairlead.engine.batch_builder import build_input
from fairlead.engine.builder import build
from fairlead.layers.context import Step, StepGroup
from fairlead.request import Request, SamplingParams
from fairlead.sampling.sampler import SamplingBatch, sample
from fairlead.scheduling.block_manager import BlockManager
from fairlead.scheduling.scheduler import Scheduler

OUTSIDE_TORCH = ("schedule", "build input", "plan", "sampling batch", "update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--num-seqs", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()
    medians = measure(args.model, args.num_seqs, args.prompt_tokens, args.steps, args.temperature)
    for part, seconds in medians.items():
        print(f"{part:16} {seconds * 1e3:8.3f} ms")
    total = sum(medians[part] for part in OUTSIDE_TORCH)
    print(f"{'outside torch':16} {total * 1e3:8.3f} ms for {args.num_seqs} sequences")


@torch.inference_mode()
def measure(model: str, num_seqs: int, prompt_tokens: int, steps: int, temperature: float) -> dict[str, float]:
    """Median seconds of each part of a decode step."""
    built = build(EngineConfig.of(model=model, max_num_seqs=num_seqs))
    runner, settings = built.runner, built.plan.settings
    chunk = max(settings.max_num_batched_tokens, num_seqs)
    blocks = BlockManager(built.plan.cache_groups, settings.block_size, max_chunk=chunk, enable_prefix_caching=True)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=chunk,
        max_model_len=settings.max_model_len,
    )
    params = SamplingParams(temperature=temperature, max_tokens=None, ignore_eos=True)
    for i in range(num_seqs):
        prompt = tuple((7 * i + j) % built.plan.info.vocab_size for j in range(prompt_tokens))
        scheduler.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params), seed=i)
    while scheduler.waiting or any(s.num_output_tokens == 0 for s in scheduler.running):
        batch = scheduler.schedule()
        prepared = runner.prepare(batch)
        scheduler.update(batch, runner.sample(prepared, runner.forward(prepared), {}, None).sampled)
    device = torch.device("cpu")
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(steps):
        marks = [time.perf_counter()]
        batch = scheduler.schedule()
        marks.append(time.perf_counter())
        inputs = build_input(batch, settings.block_size, device)
        marks.append(time.perf_counter())
        plans = [backend.plan(m) for backend, m in zip(runner.backends, inputs.attention, strict=True)]
        marks.append(time.perf_counter())
        parts = zip(runner.backends, runner.kv_caches, plans, strict=True)
        step = Step(groups=tuple(StepGroup(backend=b, kv_caches=c, plan=p) for b, c, p in parts))
        hidden_TE = runner.model(inputs.token_ids_T, inputs.positions_T, step)
        logits_RV = runner.model.logits(hidden_TE[inputs.sample_rows_R])
        marks.append(time.perf_counter())
        rows = SamplingBatch.of([c for c in batch.chunks if c.sample_seed is not None])
        marks.append(time.perf_counter())
        sampled, _ = sample(logits_RV, rows)
        marks.append(time.perf_counter())
        scheduler.update(batch, sampled)
        marks.append(time.perf_counter())
        names = ("schedule", "build input", "plan", "model", "sampling batch", "sample", "update")
        for part, (start, end) in zip(names, itertools.pairwise(marks), strict=True):
            seconds[part].append(end - start)
    return {part: statistics.median(values) for part, values in seconds.items()}


if __name__ == "__main__":
    main()
