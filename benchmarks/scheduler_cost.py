"""Prints what `schedule` and `update` cost for a batch of decoding sequences; no model runs.

    python benchmarks/scheduler_cost.py --num-seqs 256

Aim: the sum's median is at most 0.5 ms for 256 running sequences.
"""

import argparse
import statistics
import time

from fairlead.request import Request, SamplingParams
from fairlead.scheduling.batch import SampledToken
from fairlead.scheduling.block_manager import BlockManager, CacheGroup
from fairlead.scheduling.scheduler import Scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ahead", action="store_true", help="each step is scheduled before the one before is over")
    args = parser.parse_args()
    num_tokens = args.prompt_tokens + args.steps + 10
    group = CacheGroup(num_blocks=args.num_seqs * (num_tokens // 16 + 1))
    chunk = args.num_seqs * args.prompt_tokens
    blocks = BlockManager([group], 16, max_chunk=chunk, enable_prefix_caching=True)
    scheduler = Scheduler(blocks, max_num_seqs=args.num_seqs, max_num_batched_tokens=chunk, max_model_len=num_tokens)
    params = SamplingParams(max_tokens=None)
    for i in range(args.num_seqs):
        prompt = tuple((i * 7 + j) % 1000 for j in range(args.prompt_tokens))
        request = Request(request_id=str(i), prompt_token_ids=prompt, params=params, eos_token_ids=(5000,))
        scheduler.add(request, seed=i)
    sampled = [SampledToken(token_id=i % 1000) for i in range(args.num_seqs)]
    seconds = []
    scheduler.update(scheduler.schedule(), sampled)
    before = scheduler.schedule() if args.ahead else None
    for _ in range(args.steps):
        start = time.perf_counter()
        batch = scheduler.schedule()
        middle = time.perf_counter()
        deltas = scheduler.update(before or batch, sampled)
        seconds.append((middle - start, time.perf_counter() - middle))
        before = batch if args.ahead else None
        assert len(deltas) == args.num_seqs
    schedule, update = (statistics.median(part) * 1e3 for part in zip(*seconds, strict=True))
    total = statistics.median(map(sum, seconds)) * 1e3
    print(f"{args.num_seqs} sequences: schedule {schedule:.3f} ms, update {update:.3f} ms, both {total:.3f} ms")


if __name__ == "__main__":
    main()
