"""`fairlead run`: one model in this process, with its text on standard output as it comes."""

import secrets
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from fairlead import FairleadError, RequestOutput, SamplingParams
from fairlead.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from fairlead import LLM

HELP = """/set NAME VALUE  temperature, top_p, top_k, min_p, max_tokens or seed    /show  the settings
/clear           forget the conversation                                /bye   leave (so does Ctrl-D)"""
_SETTABLE: Mapping[str, Callable[[str], float | int]] = {
    "temperature": float,
    "top_p": float,
    "min_p": float,
    "top_k": int,
    "max_tokens": int,
    "seed": int,
}


def run(settings: Mapping[str, Any], prompt: str | None, sampling: Mapping[str, Any], *, show_stats: bool) -> int:
    """Completes the prompt, or what is piped in; chats where there is neither. Returns the exit status."""
    chat = prompt is None and sys.stdin.isatty()
    if prompt is None and not chat:
        prompt = sys.stdin.read()
    given = {name: value for name, value in sampling.items() if value is not None}
    SamplingParams(**given)  # a wrong value is told before anything is loaded
    if prompt == "":
        raise RequestError("the prompt is empty; give some text", param="prompt")
    from fairlead import LLM  # imports torch

    llm = LLM(**{"model": "demo", **settings})
    try:
        params = replace(llm.get_default_sampling_params(), **given)
        if params.seed is None:
            params = replace(params, seed=secrets.randbits(63))
        if prompt is None:
            Chat(llm, params, show_stats=show_stats).run()
        else:
            _print_stream(llm.generate_stream(prompt, params), show_stats=show_stats)
    finally:
        llm.close()
    return 0


@dataclass
class _Timer:
    """Takes the times of one answer."""

    start: float
    first: float | None = None
    num_first: int = 0

    def note(self, output: RequestOutput) -> None:
        if self.first is None:
            self.first, self.num_first = time.perf_counter(), len(output.outputs[0].token_ids)

    def report(self, output: RequestOutput) -> str:
        assert self.first is not None
        end, to_first = time.perf_counter(), self.first - self.start
        num_prompt, num_output = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        rate = f"{(num_output - self.num_first) / (end - self.first):.1f}" if num_output > self.num_first else "-"
        return (
            f"first token after {to_first * 1000:.0f} ms · "
            f"prompt {num_prompt} tokens, {num_prompt / to_first:.1f} tok/s"
            f" · output {num_output} tokens, {rate} tok/s"
        )


def _print_stream(outputs: Iterator[RequestOutput], *, show_stats: bool) -> RequestOutput | None:
    """Prints the text as it comes; returns the last output. Ends early when `outputs` does."""
    timer, num_chars, output = _Timer(time.perf_counter()), 0, None
    for output in outputs:
        timer.note(output)
        text = output.outputs[0].text
        print(text[num_chars:], end="", flush=True)
        num_chars = len(text)
    print(flush=True)
    if output is not None and output.error is not None:
        raise FairleadError(f"the model failed: {output.error}")
    if output is not None and show_stats:
        print(timer.report(output), file=sys.stderr)
    return output


@contextmanager
def _interruptible(outputs: Iterator[RequestOutput]) -> Iterator[Iterator[RequestOutput]]:
    """Ctrl-C ends the iterator between two steps; raised inside a step it would leave the engine half-way."""
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    def until_stopped() -> Iterator[RequestOutput]:
        for output in outputs:
            yield output
            if stopped:
                return

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield until_stopped()
    finally:
        signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation at the terminal."""

    def __init__(self, llm: "LLM", params: SamplingParams, *, show_stats: bool) -> None:
        self._llm, self._params, self._show_stats = llm, params, show_stats
        self._messages: list[dict[str, Any]] = []

    def run(self) -> None:
        """Reads lines until /bye or Ctrl-D."""
        self._say(f"{self._llm.info.model} on {self._llm.info.platform}. /help lists the commands.")
        while True:
            try:
                line = input(">>> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                self._say("\n(/bye or Ctrl-D leaves)")
                continue
            if line == "/bye":
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)
            except (RequestError, ConfigError) as error:
                self._say(f"error: {error}")

    def _answer(self, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        stream = self._llm.chat_stream(messages, self._params)
        assert isinstance(stream, Generator)  # closing it aborts the request
        with closing(stream), _interruptible(stream) as outputs:
            output = _print_stream(outputs, show_stats=self._show_stats)
        if output is not None:
            self._messages = [*messages, {"role": "assistant", "content": output.outputs[0].text}]

    def _command(self, line: str) -> None:
        match line.split():
            case ["/set", name, value] if name in _SETTABLE:
                try:
                    changed: dict[str, Any] = {name: _SETTABLE[name](value)}
                    self._params = replace(self._params, **changed)
                except ValueError as error:
                    raise RequestError(f"{name} cannot be {value!r}: {error}") from error
            case ["/show"]:
                self._say("  ".join(f"{name} {getattr(self._params, name)}" for name in _SETTABLE))
            case ["/clear"]:
                self._messages = []
            case _:
                self._say(HELP)

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
