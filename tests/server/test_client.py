"""`fairlead chat` and `complete` against a server over the fake engine."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from command_line import invoke

from fairlead.config import ServerConfig


def test_a_prompt_is_completed(capsys: pytest.CaptureFixture[str], fake_server: Any) -> None:
    front = fake_server.engine.front_end
    ids = front.encode("But soft")
    status, out, err = invoke(capsys, "complete", "But soft", "--url", fake_server.url, "--max-tokens", str(len(ids)))
    assert (status, out, err) == (0, front.decode(ids) + "\n", "")
    assert invoke(capsys, "complete", "-q", "But soft", "--url", f"{fake_server.url}/v1/", "--max-tokens", "2")[0] == 0


def test_a_pipe_and_the_environment(
    capsys: pytest.CaptureFixture[str], fake_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("But soft"))
    monkeypatch.setenv("FAIRLEAD_URL", fake_server.url)
    status, out, _ = invoke(capsys, "chat", "--system-prompt", "Be brief.", "--max-tokens", "5")
    assert status == 0
    assert out.strip()


def test_a_conversation_at_the_terminal_goes_on(
    capsys: pytest.CaptureFixture[str], fake_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["Hi", "", "Again"])
    posted: list[Any] = []
    from fairlead_server.client import Client

    original = Client._open

    def noted(self: Client, path: str, body: Any) -> Any:
        posted.append(body)
        return original(self, path, body)

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(Client, "_open", noted)
    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    status, out, err = invoke(capsys, "chat", "--url", fake_server.url, "--max-tokens", "4")
    assert status == 0
    assert "Ctrl-D" in err
    chats = [body["messages"] for body in posted if body and "messages" in body]
    assert [message["role"] for message in chats[-1]][:3] == ["user", "assistant", "user"]
    assert chats[-1][1]["content"] in out


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["complete", "Hi", "--url", "http://127.0.0.1:1"], 1, "cannot be reached"),
        (["complete", "Hi", "--url", "localhost"], 2, "must begin with http"),
        (["complete", "Hi", "--quick", "Hi"], 2, "given twice"),
        (["complete", "Hi", "--url", "URL", "--model", "gpt"], 1, "answered 404: The model `gpt` does not exist."),
        (["chat", "Hi", "--url", "URL", "--max-tokens", "0"], 1, "answered 400: max_tokens"),
        (["bench", "serve", "--url", "http://127.0.0.1:1"], 1, "cannot be reached"),
        (["bench", "serve", "--url", "ftp://x"], 2, "must begin with http"),
        (
            ["bench", "serve", "--url", "URL", "--model", "gpt"],
            1,
            "the first one: status 404: The model `gpt`",
        ),
    ],
)
def test_a_failure_is_one_line(
    capsys: pytest.CaptureFixture[str], fake_server: Any, arguments: list[str], status: int, expected: str
) -> None:
    code, out, err = invoke(capsys, *(fake_server.url if a == "URL" else a for a in arguments))
    assert (code, out) == (status, "")
    assert expected in err
    assert err.count("\n") == 1


def test_an_answer_that_breaks_off_is_told(
    capsys: pytest.CaptureFixture[str], fake_server: Any, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fairlead_server.client import Client

    client = Client(fake_server.url)
    with pytest.raises(Exception, match="the server ended the answer: The engine failed"):
        list(client._events("/v1/completions", {"prompt": [fake.NAN], "max_tokens": 90}))


def test_a_key_is_sent(capsys: pytest.CaptureFixture[str], serving: Callable[..., Any]) -> None:
    with serving(ServerConfig(api_key=("k",))) as server:
        assert "answered 401" in invoke(capsys, "complete", "Hi", "--url", server.url)[2]
        assert invoke(capsys, "complete", "Hi", "--url", server.url, "--api-key", "k", "--max-tokens", "2")[0] == 0
