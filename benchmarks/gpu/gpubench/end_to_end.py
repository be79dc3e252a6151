"""Step 6: requests from end to end, beside transformers on the same card: one by one, batched, continuous batching.

Every system has a process of its own and gets the same random requests; outputs are cut to the length asked for. The
models have the same shape and other random weights, so tokens are not compared here (see `correctness`).
"""

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers

from fairlead.request import Request, SamplingParams
from gpubench.engines import opened
from gpubench.harness import Card, Case, Settings, profiled
from gpubench.models import config_of

SYSTEMS = ("fairlead", "transformers one by one", "transformers batched", "transformers continuous batching")
MODELS = ("llama1b", "llama8b")
GROUPS = tuple(f"{model}: {system}" for model in MODELS for system in SYSTEMS)
NUM_REQUESTS, NUM_ONE_BY_ONE = 256, 8
BATCH = 64

Requests = list[tuple[list[int], int]]
"""Prompts with the number of tokens wanted."""


def workload(settings: Settings, vocab_size: int) -> Requests:
    """About 512 tokens in and 256 out, a quarter up or down."""
    draw = np.random.default_rng(0)
    num, size_in, size_out = settings.pick((NUM_REQUESTS, 512, 256), (4, 24, 6))
    lens_in = draw.integers(size_in * 3 // 4, size_in * 5 // 4 + 1, size=num)
    lens_out = draw.integers(size_out * 3 // 4, size_out * 5 // 4 + 1, size=num)
    return [(draw.integers(vocab_size, size=i).tolist(), int(o)) for i, o in zip(lens_in, lens_out, strict=True)]


def cases(settings: Settings, group: str) -> Iterator[tuple[str, Callable[[], Case]]]:
    """One system."""
    model, system = group.split(": ")
    yield group, partial(fairlead if system == "fairlead" else of_transformers, settings, model, system)


def fairlead(settings: Settings, model: str, system: str) -> Case:
    """Through the engine that LLM.generate drives. The first run warms up."""
    card = Card(settings)
    asked = workload(settings, config_of(model, is_tiny=settings.is_tiny).vocab_size)
    with opened(settings, model) as engine:

        def run(some: Requests = asked) -> int:
            total = 0
            for i, (prompt, num_out) in enumerate(some):
                params = SamplingParams(temperature=0, max_tokens=num_out, ignore_eos=True, detokenize=False)
                engine.add_request(Request(request_id=str(i), prompt_token_ids=tuple(prompt), params=params))
            while engine.has_work:
                total += sum(len(delta.token_ids) for delta in engine.step())
            return total

        run()
        found = [_rate(card, run, sum(n for _, n in asked)) for _ in range(settings.pick(3, 1))]
        few = [(prompt, 16) for prompt, _ in asked[:64]]  # all of them would fill the profiler's memory
        profiled(card, partial(run, few), settings.out / "profiles" / f"end_to_end_{model}.txt")
        best = max(found, key=lambda case: float(case["output_tokens_per_s"]))
        return {**best, "runs": [case["output_tokens_per_s"] for case in found]}


def _rate(card: Card, run: Callable[[], int], expected: int) -> Case:
    """Output tokens per second; raises if not all came."""
    card.platform.synchronize()
    start = time.perf_counter()
    num_tokens = run()
    card.platform.synchronize()
    seconds = time.perf_counter() - start
    if num_tokens != expected:
        raise RuntimeError(f"{num_tokens} tokens came, {expected} were asked for")
    return {"output_tokens_per_s": num_tokens / seconds, "seconds": seconds, "tokens": num_tokens}


def of_transformers(settings: Settings, model: str, system: str) -> Case:
    """Its own model of the same shape, on the same device."""
    card = Card(settings)
    config = config_of(model, is_tiny=settings.is_tiny)
    asked = workload(settings, config.vocab_size)
    make: Callable[..., Any] = transformers.AutoModelForCausalLM.from_config
    with card.device:
        network = make(config, dtype=settings.torch_dtype, attn_implementation="sdpa").eval()
    if system.endswith("continuous batching"):
        found = _continuous(card, network, asked)
    else:
        is_single = system.endswith("one by one")
        asked = asked[:NUM_ONE_BY_ONE] if is_single else asked
        size = 1 if is_single else settings.pick(BATCH, 2)
        _batched(network, asked[:1], 1, card.device)  # warms up
        run = partial(_batched, network, asked, size, card.device)
        found = _rate(card, run, sum(n for _, n in asked))
    del network
    gc.collect()
    return found | {"num_requests": len(asked)}


@torch.inference_mode()
def _batched(network: Any, asked: Requests, size: int, device: torch.device) -> int:
    """`generate` over padded batches, each as long as its longest output; counts what was asked for."""
    total = 0
    for first in range(0, len(asked), size):
        batch = asked[first : first + size]
        longest, num_out = max(len(p) for p, _ in batch), max(n for _, n in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (prompt, _) in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        how = _how(max_new_tokens=num_out, min_new_tokens=num_out, eos_token_id=None)
        out = network.generate(ids.to(device), attention_mask=mask.to(device), generation_config=how)
        if out.shape[1] != longest + num_out:
            raise RuntimeError(f"generate gave {out.shape[1] - longest} tokens, {num_out} were asked for")
        total += sum(n for _, n in batch)
    return total


def _how(**settings: Any) -> Any:
    """Greedy; no end of sequence ends an output."""
    make: Any = transformers.GenerationConfig
    return make(do_sample=False, pad_token_id=0, **settings)


def _continuous(card: Card, network: Any, asked: Requests) -> Case:
    """What `generate_batch` is made of; through its manager every request has a length of its own. Its start, its
    warm-up and a first few requests are not timed."""
    longest = max(n for _, n in asked)
    how = _how(max_new_tokens=longest, eos_token_id=-1)
    # Its own choice sizes the cache by the memory, which on a host of a dry run takes half a minute to fill.
    own = card.settings.pick({}, {"num_blocks": 16, "max_batch_tokens": 64})
    sizes = transformers.ContinuousBatchingConfig(**own)
    with network.continuous_batching_context_manager(
        generation_config=how, continuous_batching_config=sizes, block=True, timeout=60
    ) as manager:
        _answers(manager, asked[:2])
        return _rate(card, partial(_answers, manager, asked), sum(n for _, n in asked))


def _answers(manager: Any, asked: Requests) -> int:
    """Tokens that came, once all are there."""
    total = num_done = 0
    for prompt, num_out in asked:
        manager.add_request(input_ids=prompt, max_new_tokens=num_out)
    while num_done < len(asked):
        result = manager.get_result(timeout=5)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the manager of transformers' continuous batching ended early")
        elif result.is_finished():
            if result.error:
                raise RuntimeError(str(result.error))
            num_done += 1
            total += len(result.generated_tokens)
    return total
