"""What the server promises under faults (reliability of the server, R1 to R12), measured on `fairlead serve demo`.

`python benchmarks/reliability/chaos.py [R1 R4 ...] [--full]` runs the named ones, or all, and prints one line of JSON
each with the figures and whether the promise was kept; it exits with 1 if one was not. --full takes the whole counts.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import multiprocessing.pool
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fairlead_server.bench import quantiles
from fairlead_server.load import Answer, Target, ask

LONG = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 300, "ignore_eos": True, "temperature": 0}
MIDDLE, SHORT = {**LONG, "max_tokens": 100}, {**LONG, "max_tokens": 20}
ARRIVAL_S = 1.0  # in which the clients of an overload come
Figures = dict[str, Any]


class Server:
    """`fairlead serve demo` as a process of its own."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "fairlead_server", "demo", "--log-level", "warning"]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        self.process = subprocess.Popen([*command, "--port", str(port), *arguments], stderr=self.log)
        self.url = self._url()
        self.target = Target.of(self.url, None)
        [self.engine_pid] = children(self.process.pid)

    def _url(self) -> str:
        for _ in range(1200):
            text = self.text()
            if "listening" in text and "try " in text:
                return text.partition("listening")[2].split()[0].removesuffix("/v1")
            if self.process.poll() is not None:
                raise SystemExit(f"the server did not start: {text}")
            time.sleep(0.1)
        raise SystemExit("the server did not start in time")

    def text(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()

    def get(self, path: str) -> int:
        """The status of a GET; 0 if nobody answers."""
        connection = http.client.HTTPConnection(self.target.host, self.target.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        connection = http.client.HTTPConnection(self.target.host, self.target.port, timeout=10)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        connection.close()
        named = [line.removeprefix("fairlead:") for line in lines if line.startswith("fairlead:")]
        return {line.split("{")[0]: float(line.split()[-1]) for line in named}

    def is_idle(self) -> bool:
        metrics = self.metrics()
        return not any(metrics[k] for k in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        status = self.process.wait(60)
        self.log.close()
        return status


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.stop()


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8")
    return [int(child) for child in text.split()]


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def num_fds(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def unsent_mib(port: int) -> float:
    """What the system holds of answers that the clients of a port have not read."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="utf-8").splitlines()[1:]]
    return sum(int(row[4].split(":")[0], 16) for row in rows if int(row[1].split(":")[1], 16) == port) / 2**20


def aside(nice: int = 0) -> "multiprocessing.pool.Pool":
    """A process of its own for what must not wait for this one's interpreter."""
    return multiprocessing.get_context("spawn").Pool(1, _step_aside, (nice,))


def _step_aside(nice: int) -> None:
    """Linux weighs processes within their session, and then the sessions: to give way, or take it, needs both."""
    os.setsid()
    with contextlib.suppress(OSError):  # a kernel without such groups, or no right to take way
        os.nice(nice)
        Path("/proc/self/autogroup").write_text(str(nice), encoding="utf-8")


def wait(condition: Callable[[], bool], seconds: float) -> float | None:
    """How long the condition took to become true; None if it did not."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > seconds:
            return None
        time.sleep(0.01)
    return time.monotonic() - start


def load(server: Server, bodies: list[dict[str, Any]], meanwhile: Callable[[], None] | None = None) -> list[Answer]:
    """Streams all bodies at once; calls `meanwhile`, in a thread, once each has its first tokens or an error."""

    async def run() -> list[Answer]:
        tasks = [asyncio.ensure_future(ask(server.target, body)) for body in bodies]
        if meanwhile is not None:
            await asyncio.sleep(1.0)
            await asyncio.to_thread(meanwhile)
        return list(await asyncio.gather(*tasks))

    return asyncio.run(run())


def dead_engine(full: bool) -> Figures:
    """R1: in-flight requests end within 1 s, /health is 503, the process exits non-zero."""
    with serving() as server:
        killed = 0.0

        def kill() -> None:
            nonlocal killed
            os.kill(server.engine_pid, signal.SIGKILL)
            killed = time.perf_counter()

        answers = load(server, [LONG] * 16, kill)
        slowest = max(answer.end for answer in answers) - killed
        health = server.get("/health")
        status = server.process.wait(30)
    ended = sum(answer.error is not None for answer in answers)
    kept = slowest <= 1 and health == 503 and status != 0
    return {"ended_with_an_error": ended, "slowest_s": slowest, "health": health, "exit": status, "kept": kept}


def hanging_engine(full: bool) -> Figures:
    """R2: /health is 503 within 10 s."""
    with serving() as server:
        os.kill(server.engine_pid, signal.SIGSTOP)
        seconds = wait(lambda: server.get("/health") == 503, 20)
        os.kill(server.engine_pid, signal.SIGCONT)
        back = wait(lambda: server.get("/health") == 200, 5)
    return {"seconds_to_503": seconds, "seconds_back": back, "kept": seconds is not None and seconds <= 10}


def probes(full: bool) -> Figures:
    """R3: each probe within 50 ms at p99 under load."""
    with serving() as server, aside() as prober:
        times: list[float] = []

        def probe() -> None:
            times.extend(prober.apply(_probe, (server.target.host, server.target.port, 200 if full else 60)))

        load(server, [LONG] * 32, probe)
    found = quantiles(times)
    return {"probe_ms": found, "kept": (found["p99"] or 0) <= 50}


def _probe(host: str, port: int, num: int) -> list[float]:
    """In a process of its own, or it would wait for the load generator's interpreter."""
    times = []
    for _ in range(num):
        for path in ("/health/live", "/health/ready", "/health/startup"):
            start = time.perf_counter()
            connection = http.client.HTTPConnection(host, port, timeout=10)
            connection.request("GET", path)
            assert connection.getresponse().status == 200
            connection.close()
            times.append(time.perf_counter() - start)
    return times


def drain(full: bool) -> Figures:
    """R4: what is in flight ends well, new ones get 503, exit 0; a second signal exits within 2 s."""
    with serving("--shutdown-timeout", "120") as server:
        during = 0

        def term() -> None:
            nonlocal during
            server.process.terminate()
            wait(lambda: server.get("/health/ready") == 503, 5)
            during = server.get("/v1/models")

        answers = load(server, [LONG] * 100, term)
        status = server.process.wait(60)
    finished = sum(answer.error is None for answer in answers)
    with serving() as server:
        second, seconds = 0, 0.0

        def twice() -> None:
            nonlocal second, seconds
            server.process.terminate()
            time.sleep(0.2)
            start = time.perf_counter()
            server.process.terminate()
            second = server.process.wait(30)
            seconds = time.perf_counter() - start

        load(server, [LONG] * 16, twice)
    kept = (finished, status, during) == (100, 0, 503) and second == 0 and seconds <= 2
    return {"finished": finished, "exit": status, "new_ones": during, "second_signal_s": seconds, "kept": kept}


def killed_parent(full: bool) -> Figures:
    """R5: kill -9 of the parent leaves no child and no socket; the port can be had again, time after time."""
    slowest, times = 0.0, 100 if full else 3
    sockets = Path(tempfile.gettempdir())
    before = {path.name for path in sockets.glob("fairlead-*")}
    port = 0
    for _ in range(times):
        server = Server(port=port)
        port = server.target.port
        server.process.kill()
        server.process.wait()
        gone = wait(lambda pid=server.engine_pid: not exists(pid), 10)  # type: ignore[misc]
        slowest = max(slowest, 99.0 if gone is None else gone)
        server.log.close()
    left = {path.name for path in sockets.glob("fairlead-*")} - before
    return {"restarts": times, "slowest_s": slowest, "left_over": len(left), "kept": slowest <= 5 and not left}


def disconnects(full: bool) -> Figures:
    """R7: clients that leave in the middle of their streams leave no block, no request and no descriptor."""
    num = 1000 if full else 100
    with serving() as server:
        load(server, [SHORT] * 4)
        time.sleep(0.5)
        fds = num_fds(server.process.pid)
        content = json.dumps({**LONG, "stream": True}).encode()
        head = server.target.head("POST", "/v1/completions", len(content))
        for _ in range(num // 50):
            connections = [socket.create_connection((server.target.host, server.target.port)) for _ in range(50)]
            for connection in connections:
                connection.sendall(head + content)
            connections[0].recv(100)
            for connection in connections:
                connection.close()
        seconds = wait(server.is_idle, 10)
        closed = wait(lambda: num_fds(server.process.pid) <= fds, 5)
        answer = load(server, [SHORT])[0]
    kept = seconds is not None and seconds <= 2 and closed is not None and answer.error is None
    return {"disconnects": num, "idle_after_s": seconds, "descriptors_after_s": closed, "kept": kept}


def overload(full: bool) -> Figures:
    """R8: ten times what fits: 429 within 20 ms, goodput near its peak, memory flat.

    Clients keep to Retry-After, and give way to the server on cores that they share, as if they had their own; the one
    that times refusals takes way, so that what it sees is the server's time and not its own.
    """
    seats, seconds, repetitions = 8, 10.0 if full else 6.0, 5 if full else 1
    arguments = ("--max-num-seqs", str(seats), "--max-queued-requests", str(seats))
    peaks, shares, times, num_refused = [], [], list[float](), 0
    with serving(*arguments) as server, aside(nice=10) as clients, aside(nice=-10) as prober:
        load(server, [MIDDLE] * 2 * seats)
        rss, lost = rss_mib(server.process.pid), _stolen_s()
        for _ in range(repetitions):
            peak, _ = _goodput(server, clients, 2 * seats, seconds)
            refusals = prober.apply_async(_refusals, (server.target, seconds))
            reached, num = _goodput(server, clients, 20 * seats, seconds)
            times += refusals.get(60)
            peaks.append(peak)
            shares.append(reached / peak)
            num_refused += num
        lost = _stolen_s() - lost
        grown = rss_mib(server.process.pid) - rss
    share, found = statistics.median(shares), quantiles(times)
    kept = share >= 0.95 and found["p99"] is not None and found["p99"] <= 20
    figures = {"refused": num_refused, "refusal_ms": found, "goodput_share": share, "goodput_shares": shares}
    figures |= {"peak_tokens_per_s": statistics.median(peaks)}
    return {**figures, "rss_grown_mib": grown, "stolen_s": lost, "kept": kept}


def _stolen_s() -> float:
    """Processor time that others on the same host have taken from this machine."""
    return int(Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=9)[8]) / os.sysconf("SC_CLK_TCK")


def _goodput(
    server: Server, clients: "multiprocessing.pool.Pool", num_clients: int, seconds: float
) -> tuple[float, int]:
    """Tokens per second that so many clients get once all have come, and their refusals."""
    refused = clients.apply_async(_persist, (server.target, num_clients, seconds + 2 * ARRIVAL_S))
    time.sleep(ARRIVAL_S)
    num, start = server.metrics()["generation_tokens_total"], time.perf_counter()
    time.sleep(seconds)
    reached = (server.metrics()["generation_tokens_total"] - num) / (time.perf_counter() - start)
    return reached, refused.get(60)


def _persist(target: Target, num_clients: int, seconds: float) -> int:
    """So many clients with one request after the other, which try again where one is refused; how many were."""
    num_refused = 0

    async def client(end: float) -> None:
        nonlocal num_refused
        await asyncio.sleep(random.uniform(0, ARRIVAL_S))
        while time.perf_counter() < end:
            answer = await ask(target, MIDDLE)
            if answer.status == 429:
                num_refused += 1
                await asyncio.sleep(random.uniform(1.0, 2.0))  # Retry-After is 1
            elif answer.error is not None:
                raise RuntimeError(answer.error)

    async def run() -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(client(end) for _ in range(num_clients)))

    asyncio.run(run())
    return num_refused


def _refusals(target: Target, seconds: float) -> list[float]:
    """How long each refusal took that eight further clients have met."""
    times = []

    async def client(end: float) -> None:
        while time.perf_counter() < end:
            await asyncio.sleep(random.uniform(0.1, 0.3))
            answer = await ask(target, SHORT)
            if answer.status == 429:
                times.append(answer.end - answer.start)

    async def run() -> None:
        end = time.perf_counter() + seconds
        await asyncio.gather(*(client(end) for _ in range(8)))

    asyncio.run(run())
    return times


def small_pool(full: bool) -> Figures:
    """R9: a pool that holds a fraction of the demand finishes every request; one that cannot fit is 400."""

    async def texts(server: Server, num: int, together: int) -> list[str]:
        places = asyncio.Semaphore(together)

        async def one(i: int) -> str:
            async with places:
                return await asyncio.to_thread(_text, server, {**LONG, "prompt": f"Scene {i}:", "max_tokens": 150})

        return list(await asyncio.gather(*(one(i) for i in range(num))))

    num = 64 if full else 16
    small = ("--num-blocks", "20", "--max-model-len", "256", "--dtype", "float32")
    with serving(*small) as server:
        crowded = asyncio.run(texts(server, num, num))
        alone = asyncio.run(texts(server, num, 1))
        answer = load(server, [{**LONG, "prompt": "word " * 300}])[0]
    equal = sum(a == b for a, b in zip(crowded, alone, strict=True))
    return {"requests": num, "equal": equal, "too_large": answer.error, "kept": equal == num}


def _text(server: Server, body: dict[str, Any]) -> str:
    connection = http.client.HTTPConnection(server.target.host, server.target.port, timeout=300)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    text: str = json.load(connection.getresponse())["choices"][0]["text"]
    connection.close()
    return text


def deadlines(full: bool) -> Figures:
    """R11: within 100 ms of the time that was set; blocks are freed."""
    errors = []
    flags = ("--max-num-seqs", "1", "--max-queue-time", "0.5", "--max-request-time", "1.0", "--max-model-len", "1024")
    with serving(*flags) as server:
        for _ in range(20 if full else 3):
            answers = load(server, [{**LONG, "max_tokens": 900, "n": 1}] * 2)
            took = sorted(answer.end - answer.start for answer in answers)
            errors += [took[0] - 0.5, took[1] - 1.0]
        idle = wait(server.is_idle, 5)
    worst = max(map(abs, errors))
    return {"worst_error_ms": 1000 * worst, "idle_after_s": idle, "kept": worst <= 0.1 and idle is not None}


def slow_readers(full: bool) -> Figures:
    """R12: clients that read nothing cost the others little, and hold little memory.

    A second server without them takes turns with the first one, so that both see the same machine.
    """
    num, rounds = (500, 10) if full else (50, 4)
    with serving() as crowded, serving() as empty:
        for server in (crowded, empty):
            load(server, [SHORT] * 4)
        rss = rss_mib(crowded.process.pid)
        content = json.dumps({**MIDDLE, "stream": True, "logprobs": 5}).encode()
        head = crowded.target.head("POST", "/v1/completions", len(content))
        slow = []
        for _ in range(num):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((crowded.target.host, crowded.target.port))
            connection.sendall(head + content)
            slow.append(connection)
        time.sleep(0.5)
        wait(lambda: crowded.metrics()["num_requests_running"] == 0, 60)
        grown = rss_mib(crowded.process.pid) - rss + unsent_mib(crowded.target.port)
        gaps: dict[Server, list[float]] = {crowded: [], empty: []}
        for i in range(rounds):
            for server in (crowded, empty)[:: 1 if i % 2 else -1]:
                gaps[server] += _gaps(load(server, [LONG] * 4))
        for connection in slow:
            connection.close()
    beside, free = quantiles(gaps[crowded])["p99"], quantiles(gaps[empty])["p99"]
    assert beside is not None
    assert free is not None
    per_stream = 1024 * grown / num
    figures = {"readers": num, "itl_p99_ms": [free, beside], "kib_per_stream": per_stream}
    return {**figures, "itl_p99_grown": beside / free - 1, "kept": beside / free < 1.05 and per_stream <= 256}


def _gaps(answers: list[Answer]) -> list[float]:
    return [b - a for answer in answers for a, b in zip(answer.times, answer.times[1:], strict=False)]


PROMISES = {
    "R1": dead_engine,
    "R2": hanging_engine,
    "R3": probes,
    "R4": drain,
    "R5": killed_parent,
    "R7": disconnects,
    "R8": overload,
    "R9": small_pool,
    "R11": deadlines,
    "R12": slow_readers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("promises", nargs="*", metavar="R", help=f"which: {', '.join(PROMISES)}; all if none is named")
    parser.add_argument("--full", action="store_true", help="the whole counts")
    asked = parser.parse_args()
    unknown = [name for name in asked.promises if name not in PROMISES]
    if unknown:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(PROMISES)}")
    all_kept = True
    for name in asked.promises or PROMISES:
        figures = PROMISES[name](asked.full)
        all_kept &= figures["kept"]
        print(json.dumps({"promise": name, **figures}), flush=True)
    raise SystemExit(0 if all_kept else 1)


if __name__ == "__main__":
    main()
