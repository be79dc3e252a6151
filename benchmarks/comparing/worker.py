"""One engine in a process: commands on standard input, answers on standard output, a line of JSON each.

{"workload": "w1", "repetition": 0} is answered by that run's metrics, or by {"error": ...}. Whatever the engine prints
goes to standard error.
"""

import json
import os
import sys
import time
from typing import Any

from comparing import adapters, workloads


def main() -> None:
    engine, model, options = sys.argv[1], sys.argv[2], adapters.Options(**json.loads(sys.argv[3]))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    start = time.perf_counter()
    try:
        adapter = adapters.ADAPTERS[engine](options)
        adapter.generate([(workloads.requests("w2", model, 99)[0][0], 2)])
    except Exception as error:  # whatever an engine raises is its answer
        answer({"error": f"{type(error).__name__}: {error}"[:500]})
        return
    answer({"ready": True, "start_s": time.perf_counter() - start})
    for line in iter(sys.stdin.readline, ""):
        command = json.loads(line)
        try:
            answer(run(adapter, model, command["workload"], command["repetition"]))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"[:500]})


def run(adapter: adapters.Adapter, model: str, workload: str, repetition: int) -> dict[str, float]:
    """One run's metrics, of as many of its requests as the adapter takes."""
    asked = workloads.requests(workload, model, repetition)
    asked = asked[: max(round(len(asked) * adapter.share), 1)]
    adapter.forget()
    if workload == "w2":
        return workloads.metrics(workload, asked, 0.0, adapter.stream(asked[0]))
    start = time.perf_counter()
    adapter.generate(asked)
    seconds = time.perf_counter() - start
    found = workloads.metrics(workload, asked, seconds, [])
    if workload == "w4":
        found["wall_s"] /= adapter.share  # of all its requests
    return found


if __name__ == "__main__":
    main()
