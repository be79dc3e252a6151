"""The bounded queue, deadlines, draining, heads and bodies of odd sizes, and readers that do not read."""

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from typing import Any

import httpx
import pytest

from fairlead.config import ServerConfig
from fairlead_server import http_protocol, middleware, streaming

Serving = Callable[..., AbstractContextManager[Any]]
LONG: dict[str, Any] = {"prompt": [300], "max_tokens": 200, "ignore_eos": True}


def connect(server: Any) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def post(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """The status and the envelope of an answer after which the server closes."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


@pytest.fixture(scope="module")
def narrow(serving: Serving) -> Iterator[Any]:
    """One seat, two places in the queue."""
    with serving(ServerConfig(max_queued_requests=2), max_num_seqs=1, revision="slow") as server:
        yield server


def test_a_full_queue_is_429_and_counted(narrow: Any, until: Callable[..., bool]) -> None:
    connections = [connect(narrow) for _ in range(3)]
    try:
        for i, connection in enumerate(connections):
            connection.sendall(post({**LONG, "stream": True}))
            assert until(lambda i=i: (narrow.service.num_active, narrow.engine.num_waiting) == (i + 1, i))
        for path, body in (
            ("/v1/completions", LONG),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ):
            response = httpx.post(narrow.url + path, json=body)
            assert (response.status_code, response.headers["retry-after"]) == (429, "1")
            assert response.json()["error"]["type"] == "rate_limit_error"
        metrics = httpx.get(f"{narrow.url}/metrics").text
        assert 'fairlead:admission_rejections_total{engine="0",model_name="demo",reason="queue_full"} 2.0' in metrics
        assert httpx.get(f"{narrow.url}/load").json() == {"server_load": 3}
    finally:
        for connection in connections:
            connection.close()
    assert until(lambda: narrow.service.num_active == 0 and narrow.engine.num_waiting == 0)


def test_an_empty_queue_takes_any_one_request(narrow: Any) -> None:
    body = {"prompt": [[300]] * 4, "max_tokens": 2, "ignore_eos": True}
    assert httpx.post(f"{narrow.url}/v1/completions", json=body).status_code == 200


def test_waiting_for_too_long_is_429_and_frees_the_place(serving: Serving, until: Callable[..., bool]) -> None:
    with (
        serving(ServerConfig(max_queue_time=0.4), max_num_seqs=1, revision="slow") as narrow,
        closing(connect(narrow)) as first,
    ):
        first.sendall(post({**LONG, "stream": True}))
        assert until(lambda: narrow.engine.stats.num_requests_running == 1)
        start = time.monotonic()
        response = httpx.post(f"{narrow.url}/v1/completions", json=LONG)
        waited = time.monotonic() - start
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
        assert "waited 0.4 s" in response.json()["error"]["message"]
        assert waited >= 0.4
        assert narrow.engine.num_waiting == 0
        assert narrow.service.num_refused["queue_timeout"] == 1
        first.close()
        assert until(lambda: narrow.engine.stats.num_requests_running == 0)


def test_a_request_that_takes_too_long_ends_with_an_error(serving: Serving, until: Callable[..., bool]) -> None:
    with serving(ServerConfig(max_request_time=0.3)) as server:
        response = httpx.post(f"{server.url}/v1/completions", json=LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "request_timeout")
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}) as stream:
            events = [line for line in stream.iter_lines() if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "request_timeout"
        assert "data: [DONE]" not in events
        assert until(lambda: server.engine.stats.num_requests_running == 0)
        assert httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 3}).status_code == 200


def test_while_it_drains_new_requests_are_503_and_probes_tell(serving: Serving, until: Callable[..., bool]) -> None:
    with serving(revision="slow") as server, httpx.Client(base_url=server.url, timeout=30) as client:
        with client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 30, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.service.is_draining = True
            for response in (
                httpx.get(f"{server.url}/v1/models"),
                httpx.post(f"{server.url}/v1/completions", json=LONG),
            ):
                assert (response.status_code, response.headers["retry-after"]) == (503, "1")
                assert response.json()["error"]["type"] == "service_unavailable_error"
            statuses = {
                p: httpx.get(f"{server.url}/health{p}").status_code for p in ("", "/live", "/ready", "/startup")
            }
            assert statuses == {"": 200, "/live": 200, "/ready": 503, "/startup": 200}
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert until(lambda: server.service.num_active == 0)


@pytest.mark.parametrize(
    "head",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 40_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x-%d: y\r\n" % i for i in range(8000)) + b"\r\n",
        b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx-endless: " + b"a" * 200_000,
    ],
    ids=["one header", "many headers", "path", "no end"],
)
def test_a_large_head_is_431(fake_server: Any, head: bytes) -> None:
    with closing(connect(fake_server)) as connection:
        for i in range(0, len(head), 4096):
            try:
                connection.sendall(head[i : i + 4096])
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.001)
        try:
            status, _ = answer(connection)
        except ConnectionResetError:  # it was closed while we sent
            status = 431
        assert status == 431
    assert httpx.get(f"{fake_server.url}/health").status_code == 200


def test_a_head_just_under_the_limit_passes(fake_server: Any) -> None:
    assert httpx.get(f"{fake_server.url}/health", headers={"x-long": "a" * 32_000}).status_code == 200


TWO_LENGTHS = b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{}   \r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"\x80\x04K\x01." * 20 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" + TWO_LENGTHS,
    ],
    ids=["words", "odd path", "pickle", "two lengths"],
)
def test_what_is_no_http_is_400_in_the_envelope(fake_server: Any, data: bytes) -> None:
    with closing(connect(fake_server)) as connection:
        connection.sendall(data)
        assert answer(connection)[0] == 400


def test_a_slow_head_and_a_slow_body_are_408(fake_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.2)
    monkeypatch.setattr(middleware, "BODY_STALL_S", 0.2)
    with closing(connect(fake_server)) as silent, closing(connect(fake_server)) as head:
        head.sendall(b"GET /health HTT")
        assert answer(silent)[0] == 408
        assert answer(head)[0] == 408
    with closing(connect(fake_server)) as body:
        body.sendall(post(LONG)[:-10])
        assert body.recv(65536).startswith(b"HTTP/1.1 408")
    assert httpx.get(f"{fake_server.url}/health").status_code == 200


def test_a_reader_that_stalls_is_cut_off(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, until: Callable[..., bool]
) -> None:
    """Its request ends, its connection is dropped with what waits on it, and others go on."""
    monkeypatch.setattr(streaming, "STALL_S", 0.3)
    with serving() as server:
        host, port = server.url.removeprefix("http://").split(":")
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect((host, int(port)))
        body = {"prompt": [300] * 2, "max_tokens": 250, "stream": True, "ignore_eos": True, "logprobs": 20, "n": 60}
        stalled.sendall(post(body))
        assert until(lambda: server.service.num_active == 1)
        assert until(lambda: server.service.num_active == 0, 20)
        assert until(lambda: server.engine.stats.num_requests_running == 0)
        assert httpx.post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 3}).status_code == 200
        stalled.settimeout(5)
        with closing(stalled), suppress(ConnectionResetError):
            data = b"".join(iter(lambda: stalled.recv(65536), b""))
            assert b"[DONE]" not in data


def test_a_hundred_equal_request_ids_get_their_own_answers(client: httpx.Client) -> None:
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        body = {
            "prompt": [100 + i],
            "max_tokens": 8,
            "ignore_eos": True,
            "return_token_ids": True,
            "request_id": "same",
        }
        response = client.post("/v1/completions", json=body).json()
        assert response["id"] == "cmpl-same"
        answers[i] = response["choices"][0]["token_ids"]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {i: [100 + i] * 8 for i in range(100)}


def test_tls(serving: Serving, tmp_path: Any) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    done = subprocess.run(
        [*command, *names, "-keyout", str(key), "-out", str(cert)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with serving(ServerConfig(ssl_keyfile=str(key), ssl_certfile=str(cert))) as server:
        url = server.url.replace("http:", "https:")
        context = ssl.create_default_context(cafile=str(cert))
        body = {**LONG, "max_tokens": 3}
        assert httpx.post(f"{url}/v1/completions", json=body, verify=context).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url}/health")
