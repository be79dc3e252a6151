"""Request ids and the limit on bodies."""

from collections.abc import Iterator

import httpx
import pytest

from fairlead_server.middleware import MAX_BODY_BYTES

BODY = {"prompt": [300], "max_tokens": 1}


def test_a_request_id_is_echoed_and_becomes_part_of_the_answers_id(client: httpx.Client) -> None:
    response = client.post("/v1/completions", json=BODY, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.json()["id"] == "cmpl-mine-1"
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stream": True}
    response = client.post("/v1/chat/completions", json=chat, headers={"x-request-id": "mine-2"})
    assert response.headers["x-request-id"] == "mine-2"
    assert '"id":"chatcmpl-mine-2"' in response.text


@pytest.mark.parametrize("sent", [None, "", "x" * 200, "a b"])
def test_a_request_id_that_is_missing_or_odd_is_replaced(client: httpx.Client, sent: str | None) -> None:
    headers = {} if sent is None else {"x-request-id": sent}
    ids = {client.get("/version", headers=headers).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert sent not in ids


def test_errors_have_a_request_id_too(client: httpx.Client) -> None:
    assert client.get("/nope", headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


def test_an_announced_body_over_the_limit_is_413(client: httpx.Client) -> None:
    response = client.post(
        "/v1/completions", content=b" " * (MAX_BODY_BYTES + 1), headers={"content-type": "application/json"}
    )
    assert response.status_code == 413
    assert "32 MiB" in response.json()["error"]["message"]


def test_a_body_that_grows_over_the_limit_is_413(client: httpx.Client) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(33):
            yield b" " * 2**20

    response = client.post("/v1/completions", content=pieces(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert client.get("/health").status_code == 200
