"""What the HTTP front costs, without the cost of a model: a server over the fake engine of the tests, under load.

`python benchmarks/http_front.py [--clients 64] [--tokens 200] [--step-ms 5] [--profile FILE]` streams to so many
clients at once and prints, as JSON, the tokens per second that they got, the time to the first token, and the share
of a core that server and load generator each used. The server runs in a process of its own; --profile writes its
cProfile there.

The time to the first token is taken of one client alone, a plain socket on a connection that it keeps: `http_adds_ms`
is how much longer it waits than `AsyncEngine` takes in the server's process, whose own time holds the step and the
way to the engine's process and back.
"""

import argparse
import asyncio
import cProfile
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import uvicorn

from fairlead.config import EngineConfig, ServerConfig
from fairlead.engine import connection
from fairlead.engine.async_engine import AsyncEngine
from fairlead.request import SamplingParams
from fairlead_server.app import create_app
from fairlead_server.bench import quantiles, summary
from fairlead_server.load import Target, generate_load
from fairlead_server.serve import bind, uvicorn_config

FAKE_ENGINE = Path(__file__).parents[1] / "tests" / "server" / "fake_engine.py"
PROMPT = [300, 301, 302, 303]
NUM_ALONE, PAUSE_S = 200, 0.005


async def _serve(port: int, step_ms: float, engine_s: Connection) -> None:
    command = (sys.executable, "-P", str(FAKE_ENGINE), str(step_ms))
    with mock.patch.object(connection, "COMMAND", command):  # as the tests do, and for the start alone
        engine = await AsyncEngine.start(EngineConfig.of(model="demo", max_num_seqs=1024))
    engine_s.send(await _engine_ttft_s(engine))
    config = ServerConfig(port=port, log_level="warning", max_queued_requests=4096)
    http = uvicorn.Server(uvicorn_config(create_app(engine, config), config))
    await http.serve(sockets=[bind("127.0.0.1", port)])
    await engine.shutdown()


async def _engine_ttft_s(engine: AsyncEngine) -> list[float]:
    times = []
    for _ in range(NUM_ALONE):
        await asyncio.sleep(PAUSE_S)
        start = time.perf_counter()
        async for _ in engine.generate(PROMPT, SamplingParams(max_tokens=1)):
            times.append(time.perf_counter() - start)
    return times


def _http_ttft_s(target: Target) -> list[float]:
    times = []
    content = json.dumps({"model": "demo", "prompt": PROMPT, "max_tokens": 1, "stream": True}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    )
    with socket.create_connection((target.host, target.port)) as connection:
        for _ in range(NUM_ALONE):
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            connection.sendall(f"{head}\r\n\r\n".encode() + content)
            found = b""
            while b"data: {" not in found:
                found += connection.recv(65536)
            times.append(time.perf_counter() - start)
            while not found.endswith(b"0\r\n\r\n"):
                found += connection.recv(65536)
    return times


def _server(port: int, step_ms: float, profile: str | None, engine_s: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn hears it, and raises it again once it has stopped
    profiler = cProfile.Profile() if profile is not None else None
    if profiler is not None:
        profiler.enable()
    try:
        asyncio.run(_serve(port, step_ms, engine_s))
    finally:
        if profiler is not None:
            profiler.disable()
            profiler.dump_stats(str(profile))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _measure(target: Target, server_pid: int, num_clients: int, num_tokens: int) -> dict[str, Any]:
    body = {"model": "demo", "prompt": PROMPT, "max_tokens": num_tokens, "ignore_eos": True}

    async def load(clients: int) -> dict[str, Any]:
        answers = await generate_load(target, [body] * clients, request_rate=0, max_concurrency=clients, seed=0)
        return summary(answers, max(a.end for a in answers) - min(a.start for a in answers))

    await load(8)  # the first ones pay for imports and connections
    server_before, client_before = _cpu_s(server_pid), time.process_time()
    found = await load(num_clients)
    server_s, client_s = _cpu_s(server_pid) - server_before, time.process_time() - client_before
    found["server_cpu_us_per_token"] = server_s / found["total_output_tokens"] * 1e6
    found["server_cpu_share"], found["client_cpu_share"] = (
        server_s / found["duration_s"],
        client_s / found["duration_s"],
    )
    return found


async def _until_up(target: Target) -> None:
    for _ in range(600):
        try:
            await target.get("/v1/models")
            return
        except Exception:  # nobody listens yet
            await asyncio.sleep(0.1)
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--profile")
    asked = parser.parse_args()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (port, asked.step_ms, asked.profile, sender)
    server = multiprocessing.get_context("spawn").Process(target=_server, args=arguments)
    server.start()
    try:
        target = Target.of(f"http://127.0.0.1:{port}", None)
        asyncio.run(_until_up(target))
        assert server.pid is not None
        found = asyncio.run(_measure(target, server.pid, asked.clients, asked.tokens))
        engine_s, http_s = receiver.recv(), _http_ttft_s(target)
        found["alone_ttft_ms"] = {"engine": quantiles(engine_s), "http": quantiles(http_s)}
        found["http_adds_ms"] = (median(http_s) - median(engine_s)) * 1000
    finally:
        server.terminate()
        server.join()
    print(json.dumps({"clients": asked.clients, "tokens": asked.tokens, "step_ms": asked.step_ms, **found}, indent=2))


if __name__ == "__main__":
    main()
