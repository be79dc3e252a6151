"""`fairlead bench serve` and `latency`: measurements whose results are JSON on standard output."""

import asyncio
import json
import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fairlead.errors import FairleadError
from fairlead_server.load import Answer, Target, generate_load

if TYPE_CHECKING:
    from fairlead import StepProfile

FIRST_TOKEN_ID, NUM_TOKEN_IDS = 10, 200


def random_prompt(draw: random.Random, num_tokens: int) -> list[int]:
    """Token ids that every vocabulary has."""
    return [draw.randrange(FIRST_TOKEN_ID, FIRST_TOKEN_ID + NUM_TOKEN_IDS) for _ in range(num_tokens)]


def bench_serve(
    url: str,
    *,
    model: str | None,
    api_key: str | None,
    num_prompts: int,
    request_rate: float,
    max_concurrency: int,
    input_len: int,
    output_len: int,
    seed: int,
) -> int:
    """Measures a running server and prints what it found. Raises FairleadError if no request succeeds."""
    target = Target.of(url, api_key)
    draw = random.Random(seed)

    async def measure() -> tuple[str, list[Answer]]:
        name = model or str((await target.get("/v1/models"))["data"][0]["id"])
        bodies = [
            {
                "model": name,
                "prompt": random_prompt(draw, input_len),
                "max_tokens": output_len,
                "ignore_eos": True,
                "temperature": 0,
            }
            for _ in range(num_prompts)
        ]
        most = max_concurrency or num_prompts
        return name, await generate_load(target, bodies, request_rate=request_rate, max_concurrency=most, seed=seed)

    start, cpu_start = time.perf_counter(), time.process_time()
    name, answers = asyncio.run(measure())
    cpu_share = (time.process_time() - cpu_start) / (time.perf_counter() - start)
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise FairleadError(f"no request succeeded; the first one: {answers[0].error}")
    for answer in answers:
        if answer.error is not None:
            print(f"a request failed: {answer.error}", file=sys.stderr)
    duration = max(answer.end for answer in answers) - min(answer.start for answer in answers)
    asked = {"model": name, "num_prompts": num_prompts, "request_rate": request_rate, "seed": seed}
    print(json.dumps({**asked, **summary(answers, duration), "client_cpu_share": cpu_share}))
    return 0 if len(good) == len(answers) else 1


def summary(answers: Sequence[Answer], duration_s: float) -> dict[str, Any]:
    """Counts, rates and latencies of the requests that succeeded; times in milliseconds."""
    good = [answer for answer in answers if answer.error is None]
    gaps = [b - a for answer in good for a, b in zip(answer.times, answer.times[1:], strict=False)]
    per_token = [
        (answer.times[-1] - answer.times[0]) / (answer.num_tokens - 1) for answer in good if answer.num_tokens > 1
    ]
    num_tokens = sum(answer.num_tokens for answer in good)
    return {
        "completed": len(good),
        "failed": len(answers) - len(good),
        "duration_s": duration_s,
        "total_input_tokens": sum(answer.num_prompt_tokens for answer in good),
        "total_output_tokens": num_tokens,
        "request_throughput": len(good) / duration_s,
        "output_throughput": num_tokens / duration_s,
        "ttft_ms": quantiles([answer.times[0] - answer.start for answer in good if answer.times]),
        "tpot_ms": quantiles(per_token),
        "itl_ms": quantiles(gaps),
        "e2el_ms": quantiles([answer.end - answer.start for answer in good]),
    }


def quantiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, median and tail, in milliseconds; None of nothing."""
    if not seconds:
        return {"mean": None, "p50": None, "p90": None, "p99": None}
    ordered = sorted(seconds)
    found: dict[str, float | None] = {"mean": 1000 * sum(ordered) / len(ordered)}
    for percent in (50, 90, 99):
        found[f"p{percent}"] = 1000 * ordered[max(math.ceil(percent / 100 * len(ordered)) - 1, 0)]
    return found


def bench_latency(
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    input_len: int,
    output_len: int,
    num_iters: int,
    num_warmup: int,
    profile: bool = False,
) -> int:
    """Measures how long one batch takes in this process, and prints what it found; with `profile` by op, too."""
    from fairlead import LLM, SamplingParams  # imports torch

    # Steps that overlap cannot be told apart.
    llm = LLM(**{**settings, "async_scheduling": False} if profile else settings)
    draw = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)

    def once() -> float:
        prompts: list[Mapping[str, Any]] = [
            {"prompt_token_ids": random_prompt(draw, input_len)} for _ in range(batch_size)
        ]
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    try:
        for _ in range(num_warmup):
            once()
        found = [once() for _ in range(num_iters)]
        where = llm.engine.profile(once) if profile else None
        name, platform = llm.info.model, llm.info.platform
    finally:
        llm.close()
    result = {
        "model": name,
        "platform": platform,
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "num_iters": num_iters,
        "latency_ms": quantiles(found),
        "output_throughput": batch_size * output_len * num_iters / sum(found),
    }
    if where is not None:
        shown = {
            "note": "steps run as they come, the device waited for after each op: compare total_ms with latency_ms",
            **_profile(where),
        }
        print("\n".join(_profile_lines(shown)), file=sys.stderr)
        result["profile"] = shown
    print(json.dumps(result))
    return 0


def _profile(found: "StepProfile") -> dict[str, Any]:
    """A profile in milliseconds; those of an op, and its calls, are of one step."""
    return {
        "total_ms": 1000 * found.total_s,
        "head_ms": 1000 * found.head_s,
        "outside_model_ms": 1000 * found.outside_s,
        "steps": [
            {
                "num_rows": rows.num_rows,
                "num_steps": rows.num_steps,
                "step_ms": 1000 * rows.seconds,
                "ops": [
                    {"op": one.op, "calls": one.calls, "ms": 1000 * one.seconds, "share": one.seconds / rows.seconds}
                    for one in rows.ops
                ],
            }
            for rows in found.by_rows
        ],
    }


def _profile_lines(profile: Mapping[str, Any]) -> list[str]:
    """The same as a table."""
    lines = [
        f"{profile['total_ms']:.1f} ms in all: {profile['head_ms']:.1f} in the head, {profile['outside_model_ms']:.1f} "
        "outside the model (scheduling, plans, sampling), and in the model:"
    ]
    for step in profile["steps"]:
        lines.append(f"{step['num_steps']} steps of {step['num_rows']} rows, {step['step_ms']:.3f} ms each")
        for one in step["ops"]:
            lines.append(f"  {one['share']:6.1%} {one['ms']:9.3f} ms  {one['calls']:5.0f} x  {one['op']}")
    return lines
