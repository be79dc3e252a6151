"""`fairlead run` on the embedded model: a prompt, a pipe, a chat at a terminal."""

import io
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import pytest

from fairlead.request import CompletionOutput, RequestOutput, SamplingParams
from fairlead_server import cli
from fairlead_server.run import Chat

if TYPE_CHECKING:
    from fairlead import LLM

COMMAND = (sys.executable, "-m", "fairlead_server.cli", "run", "demo")


Complete = Callable[..., tuple[int, str, str]]


@pytest.fixture
def complete(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Complete:
    """Runs the command in this process, with these arguments and this text on its standard input."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as raised:
            cli.main(["run", "demo", "--max-tokens", "24", "--seed", "7", "--num-blocks", "64", *arguments])
        captured = capsys.readouterr()
        assert isinstance(raised.value.code, int)
        return raised.value.code, captured.out, captured.err

    return run


def test_a_prompt_gives_text_alone_on_stdout_and_stats_on_stderr(complete: Complete) -> None:
    status, out, err = complete("ROMEO:", "--stats")
    assert status == 0, err
    assert len(out) > 10
    assert out.endswith("\n")
    pattern = r"first token after \d+ ms · prompt \d+ tokens, [\d.]+ tok/s · output 24 tokens, [\d.]+ tok/s\n"
    assert re.fullmatch(pattern, err)
    assert complete(stdin="ROMEO:") == (0, out, "")  # a pipe gives the same, under one seed


def test_an_empty_pipe_is_one_line_at_once(complete: Complete) -> None:
    assert complete() == (1, "", "error: the prompt is empty; give some text\n")


def test_an_interrupt_is_130_without_a_traceback(offline: dict[str, str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, "ROMEO:", "--max-tokens", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=offline,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_leaves_is_no_fault(offline: dict[str, str]) -> None:
    process = subprocess.Popen([*COMMAND, "ROMEO:"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=offline)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    process.wait(60)
    assert err == b""


# Opening a terminal makes it the controlling one of a new session, so that its Ctrl-C reaches the process.
IN_TERMINAL = "import os, sys; os.close(os.open(sys.argv[1], os.O_RDWR)); os.execv(sys.executable, sys.argv[2:])"


class Terminal:
    """A chat in a pseudo-terminal."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._fd, terminal = os.openpty()
        arguments = [*COMMAND, "--max-tokens", "200", "--seed", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, os.ttyname(terminal), *arguments],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            env=environment,
        )
        os.close(terminal)
        self.seen = ""

    def wait_for(self, pattern: str) -> str:
        """Reads until the pattern appears; returns what came, and forgets it."""
        while not re.search(pattern, self.seen):
            self.seen += os.read(self._fd, 4096).decode(errors="replace")
        text, self.seen = self.seen, ""
        return text

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt_until(self, pattern: str) -> None:
        """Presses Ctrl-C, again after a second: input() misses one that comes just as it begins to wait."""
        while not re.search(pattern, self.seen):
            self.type("\x03")
            while not re.search(pattern, self.seen) and select.select([self._fd], [], [], 1)[0]:
                self.seen += os.read(self._fd, 4096).decode(errors="replace")
        self.wait_for(pattern)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)


@pytest.fixture
def terminal(offline: dict[str, str]) -> Iterator[Terminal]:
    made = Terminal(offline)
    yield made
    made.close()


class FakeLLM:
    """Answers with ten words, one a step; Ctrl-C is pressed after the third."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.closed = False

    def chat_stream(self, messages: list[dict[str, Any]], params: SamplingParams) -> Iterator[RequestOutput]:
        self.asked.append(messages)
        try:
            for count in range(1, 11):
                text = " ".join(["word"] * count)
                output = CompletionOutput(index=0, text=text, token_ids=[5] * count)
                yield RequestOutput(
                    request_id="0", prompt=None, prompt_token_ids=[1], outputs=[output], finished=count == 10
                )
                if count == 3:
                    os.kill(os.getpid(), signal.SIGINT)
        finally:
            self.closed = True


def test_ctrl_c_ends_the_answer_between_two_steps_and_the_chat_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    llm, handler = FakeLLM(), signal.getsignal(signal.SIGINT)
    chat = Chat(cast("LLM", llm), SamplingParams(), show_stats=False)
    chat._answer("Speak")
    assert llm.closed
    assert capsys.readouterr().out == "word word word word\n"
    assert signal.getsignal(signal.SIGINT) is handler
    chat._answer("More")
    assert [message["content"] for message in llm.asked[1]] == ["Speak", "word word word word", "More"]


@pytest.mark.timeout(120)
def test_a_chat(terminal: Terminal) -> None:
    terminal.wait_for(">>> ")
    terminal.type("/set max_tokens 8\n")
    terminal.wait_for(">>> ")
    terminal.type("/set temperature cold\n")
    assert "error: temperature cannot be 'cold'" in terminal.wait_for(">>> $")
    terminal.type("/set top_p 5\n")
    assert "error: top_p" in terminal.wait_for(">>> $")
    terminal.type("/show\n")
    assert "max_tokens 8" in terminal.wait_for(">>> $")
    terminal.type("Hello\n")
    terminal.wait_for(">>> $")
    terminal.type("/clear\n")
    terminal.wait_for(">>> $")
    terminal.type("/nonsense\n")
    assert "/bye" in terminal.wait_for(">>> $")
    terminal.interrupt_until("Ctrl-D leaves[^>]*>>> $")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
