"""A real server process on the embedded model, and the official OpenAI client."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

CHAT: list[Any] = [{"role": "user", "content": "Speak, Romeo."}]
START_S = 120


@pytest.fixture(scope="module")
def server(module_server: Any) -> str:
    return str(module_server.wait_for_url(START_S))


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def gauges(server: str) -> tuple[float, float, float]:
    lines = httpx.get(f"{server}/metrics").text.splitlines()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if not line.startswith("#")}
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    running, waiting, usage = (values[f"fairlead:{name}"] for name in names)
    return running, waiting, usage


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == "demo"
    assert client.models.retrieve("demo").id == "demo"


def test_completion_streamed_and_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "ROMEO:", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert len(whole.choices[0].text) > 10
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    # Tokens share a chunk while the client is behind, so only a long text must come in several.
    assert len(list(client.completions.create(**{**asked, "max_tokens": 200}, stream=True))) > 2


def test_chat_streamed_and_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": CHAT, "max_tokens": 24, "temperature": 0, "seed": 1}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_chat_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": CHAT, "max_tokens": 4, "temperature": 0}
    found = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert found is not None
    assert found.content
    for entry in found.content:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob


def test_echo_with_logprobs_as_evaluation_harnesses_send_it(client: openai.OpenAI) -> None:
    prompts = [[40, 50, 60, 70], [80, 90]]
    answer = client.completions.create(
        model="demo", prompt=prompts, echo=True, logprobs=1, max_tokens=1, temperature=0, seed=1
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        found = choice.logprobs
        assert found is not None
        assert found.token_logprobs is not None
        assert found.top_logprobs is not None
        assert len(found.token_logprobs) == len(prompt) + 1
        assert found.token_logprobs[0] is None
        assert found.token_logprobs[-1] == max(found.top_logprobs[-1].values())  # greedy
        assert all(value < 0 for value in found.token_logprobs[1:])


def test_beams_come_best_first(client: openai.OpenAI) -> None:
    extra = {"use_beam_search": True, "best_of": 3}
    answer = client.completions.create(
        model="demo", prompt="ROMEO:", n=2, temperature=0, max_tokens=8, logprobs=0, extra_body=extra
    )
    sums = [sum(choice.logprobs.token_logprobs or ()) for choice in answer.choices if choice.logprobs is not None]
    assert len(sums) == 2
    assert sums[0] >= sums[1]


def test_errors_are_the_clients_own_types(client: openai.OpenAI, server: str) -> None:
    with pytest.raises(openai.NotFoundError, match="The model `gpt` does not exist"):
        client.completions.create(model="gpt", prompt="Hi")
    with pytest.raises(openai.BadRequestError, match="This model's maximum context length is") as raised:
        client.completions.create(model="demo", prompt="word " * 5000)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="presence_penalty"):
        client.completions.create(model="demo", prompt="Hi", presence_penalty=2.5)
    with pytest.raises(openai.BadRequestError, match=r"no logits processor 'os.system'"):
        client.completions.create(model="demo", prompt="Hi", extra_body={"logits_processors": ["os.system"]})
    malformed = httpx.post(f"{server}/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert malformed.status_code == 400
    assert malformed.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"logits_processors": ["os.system"]},
        {"structured_outputs": {"regex": "("}},
        {"structured_outputs": {"regex": "(" * 30_000 + ")" * 30_000}},
        {"structured_outputs": {"grammar": "root ::= nothing"}},
        {"structured_outputs": {"choice": [str(i) for i in range(100_000)]}},
        {"guided_json": {"$ref": "#"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
    ],
    ids=["code", "regex", "parens", "grammar", "choices", "recursion", "schema"],
)
def test_what_only_the_engine_can_judge_is_400_on_every_route(server: str, fields: dict[str, Any]) -> None:
    for path, prompt in (("completions", {"prompt": "Hi"}), ("chat/completions", {"messages": CHAT})):
        response = httpx.post(f"{server}/v1/{path}", json={**prompt, "max_tokens": 3, **fields}, timeout=60)
        assert response.status_code == 400, response.text
        assert len(response.content) < 1500
    assert httpx.post(f"{server}/v1/completions", json={"prompt": "Hi", "max_tokens": 5}, timeout=60).status_code == 200


def test_a_tenth_of_a_second_is_enough_for_health_while_busy(server: str, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="demo", prompt="ROMEO:", max_tokens=100, stream=True)
    next(iter(stream))
    assert httpx.get(f"{server}/health", timeout=1).status_code == 200
    stream.close()


def test_fifty_concurrent_streams_finish(server: str) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as client:

            async def one(i: int) -> str:
                extra = {"ignore_eos": True}
                stream = await client.completions.create(
                    model="demo", prompt=f"Scene {i}:", max_tokens=16, stream=True, extra_body=extra
                )
                return str([chunk async for chunk in stream][-1].choices[0].finish_reason)

            return await asyncio.gather(*(one(i) for i in range(50)))

    assert asyncio.run(main()) == ["length"] * 50


def test_two_hundred_clients_that_drop_leave_nothing(
    server: str, client: openai.OpenAI, until: Callable[..., bool], count: Callable[..., int]
) -> None:
    host, port = server.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "ROMEO:", "max_tokens": 500, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    connections = []
    for _ in range(count(200, full=1000)):
        connections.append(socket.create_connection((host, int(port))))
        connections[-1].sendall(head.encode() + b"\r\n\r\n" + body)
    for connection in connections[:20]:
        assert connection.recv(100)  # in the middle of their streams; the others are wherever they are
    for connection in connections:
        connection.close()
    assert until(lambda: gauges(server) == (0, 0, 0), 10), gauges(server)
    assert client.completions.create(model="demo", prompt="Hi", max_tokens=5).choices


def test_sigterm_finishes_what_runs_and_leaves_no_child(
    start_server: Callable[..., Any], until: Callable[..., bool], alive: Callable[[int], bool]
) -> None:
    server = start_server("demo", "--port", "0")
    url = server.wait_for_url(START_S)
    engine = server.engine_pids()
    assert len(engine) == 1
    assert b"GOMP_SPINCOUNT=" in Path(f"/proc/{min(engine)}/environ").read_bytes()  # what the platform asks for
    assert httpx.get(f"{url}/health").status_code == 200
    body = {"prompt": "ROMEO:", "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert until(lambda: httpx.get(f"{url}/health/ready").status_code == 503, 5)
        assert httpx.post(f"{url}/v1/completions", json=body).json()["error"]["type"] == "service_unavailable_error"
        assert httpx.get(f"{url}/health/live").status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.wait(30) == 0
    assert not any(map(alive, engine))
    assert "Traceback" not in server.stderr
    assert "POST /v1/completions" in server.stderr
    assert "GET /health" not in server.stderr


def test_a_second_signal_does_not_wait(start_fake_server: Callable[..., Any], alive: Callable[[int], bool]) -> None:
    server = start_fake_server("--port", "0", "--revision", "slow")
    url = server.wait_for_url(START_S)
    engine = server.engine_pids()
    body = {"prompt": "ROMEO:", "max_tokens": 200, "n": 8, "stream": True, "ignore_eos": True}
    with suppress(httpx.HTTPError), httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert server.wait(30) == 0
        assert time.monotonic() - start < 10  # its requests would take 20
    assert not any(map(alive, engine))


def test_a_killed_server_leaves_no_engine_and_no_socket_and_its_port_is_free(
    start_fake_server: Callable[..., Any], until: Callable[..., bool], alive: Callable[[int], bool]
) -> None:
    server = start_fake_server("--port", "0")
    url = server.wait_for_url(START_S)
    engine = server.engine_pids()
    assert engine
    server.process.kill()
    server.wait(10)
    assert until(lambda: not any(map(alive, engine)), 5)
    again = start_fake_server("--port", url.rpartition(":")[2])
    assert again.wait_for_url(START_S) == url
    [engine_pid] = again.engine_pids()
    os.kill(engine_pid, signal.SIGKILL)
    assert until(lambda: httpx.get(f"{url}/health").status_code == 503, 2.5)
    assert again.wait(15) == 1
    assert "error: the engine's process was killed by signal 9" in again.stderr


def test_an_interrupt_while_loading_is_130_and_leaves_no_child(
    start_fake_server: Callable[..., Any], until: Callable[..., bool], alive: Callable[[int], bool]
) -> None:
    server = start_fake_server("--port", "0", "--revision", "sleep")
    engine: set[int] = set()

    def spawned() -> bool:
        engine.update(server.engine_pids())
        return bool(engine)

    assert until(spawned, START_S)
    server.process.send_signal(signal.SIGINT)
    assert server.wait(10) == 130
    assert until(lambda: not any(map(alive, engine)), 5)
    assert "listening" not in server.stderr
    assert "Traceback" not in server.stderr


def test_a_model_that_cannot_be_loaded_is_one_line_and_1(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}')
    done = subprocess.run(
        [sys.executable, "-m", "fairlead_server", str(tmp_path), "--port", "0", "--skip-tokenizer-init"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "NoSuchModel" in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_what_outlasts_the_shutdown_timeout_is_told_and_cut_off(
    start_fake_server: Callable[..., Any], alive: Callable[[int], bool]
) -> None:
    server = start_fake_server("--port", "0", "--revision", "slow", "--shutdown-timeout", "0.3")
    url = server.wait_for_url(START_S)
    engine = server.engine_pids()
    body = {"prompt": "ROMEO:", "max_tokens": 200, "n": 16, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
    assert server.wait(30) == 0
    assert "did not end in time" in server.stderr
    assert not any(map(alive, engine))


def test_a_unix_socket_serves(start_fake_server: Callable[..., Any], short_path: Path) -> None:
    path = short_path / "s"
    server = start_fake_server("--uds", str(path))
    server.wait_for_url(START_S)
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost", timeout=60) as client:
        answer = client.post("/v1/completions", json={"prompt": "ROMEO:", "max_tokens": 3})
        assert answer.json()["usage"]["completion_tokens"] == 3
    server.process.terminate()
    assert server.wait(30) == 0
    assert not path.exists()
