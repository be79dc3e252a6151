"""`fairlead chat` and `fairlead complete`: the terminal as a client of a running server. Standard library alone."""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from fairlead.errors import ConfigError, FairleadError

Json = dict[str, Any]
TIMEOUT_S = 600.0


class Client:
    """Speaks to one server. Every failure is a FairleadError of one line."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url must begin with http:// or https://, got {url!r:.200}")
        self._base = url.rstrip("/").removesuffix("/v1")
        self._headers = {"content-type": "application/json"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"
        self._model = model

    @property
    def model(self) -> str:
        """The model that was named, or else the first one of the server."""
        if self._model is None:
            with self._open("/v1/models", None) as response:
                self._model = str(json.load(response)["data"][0]["id"])
        return self._model

    def chat(self, messages: list[Json], options: Mapping[str, Any]) -> Iterator[str]:
        """The answer to a conversation, piece by piece."""
        for chunk in self._events("/v1/chat/completions", {"messages": messages, **options}):
            for choice in chunk.get("choices", ()):
                yield choice["delta"].get("content") or ""

    def complete(self, prompt: str, options: Mapping[str, Any]) -> Iterator[str]:
        """What follows a prompt, piece by piece."""
        for chunk in self._events("/v1/completions", {"prompt": prompt, **options}):
            for choice in chunk.get("choices", ()):
                yield choice["text"]

    def _events(self, path: str, body: Json) -> Iterator[Json]:
        given = {name: value for name, value in body.items() if value is not None}
        with self._open(path, {"model": self.model, "stream": True, **given}) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return
                if data:
                    chunk: Json = json.loads(data)
                    if "error" in chunk:
                        raise FairleadError(f"the server ended the answer: {chunk['error']['message']}")
                    yield chunk
        raise FairleadError("the server ended the answer before it was complete")

    def _open(self, path: str, body: Json | None) -> Any:
        url = self._base + path
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers)
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                raise FairleadError(f"{url} answered {error.code}: {_message(error.read())}") from error
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            raise FairleadError(f"{url} cannot be reached: {reason}; is the server running? See --url") from error


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


def complete(client: Client, prompt: str | None, options: Mapping[str, Any]) -> int:
    """Completes the prompt, or what is piped in, or each line that is typed. Returns the exit status."""
    for text in _inputs(prompt):
        _print(client.complete(text, options))
    return 0


def chat(client: Client, prompt: str | None, system: str | None, options: Mapping[str, Any]) -> int:
    """Answers the prompt, or what is piped in, or chats. Returns the exit status."""
    messages: list[Json] = [] if system is None else [{"role": "system", "content": system}]
    for text in _inputs(prompt):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _print(client.chat(messages, options))})
    return 0


def _inputs(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
    elif not sys.stdin.isatty():
        yield sys.stdin.read()
    else:
        print("Ctrl-D leaves.", file=sys.stderr)
        while True:
            try:
                line = input(">>> ").strip()
            except EOFError:
                print()
                return
            if line:
                yield line


def _print(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print(flush=True)
    return text
