"""Attacks are refused in time, the worker dies alone, and the caches stay within their bytes."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fairlead import LLM, SamplingParams, StructuredOutputParams
from fairlead.errors import ConfigError, RequestError
from fairlead.sampling.structured import backend as backends
from fairlead.sampling.structured.backend import Vocabulary, backend_names, choose_backend
from fairlead.sampling.structured.checker import CANCELLED, Checker
from fairlead.sampling.structured.compiler import CompileQueue, Compiler, GrammarCache

LIMIT_S = 5.0


@pytest.fixture(scope="module")
def checker(vocabulary: Vocabulary) -> Iterator[Checker]:
    made = Checker(vocabulary)
    yield made
    made.close()


@pytest.fixture
def compiler(vocabulary: Vocabulary) -> Iterator[Compiler]:
    made = Compiler(("llguidance",), lambda: vocabulary, cache_bytes=1 << 20)
    yield made
    made.close()


def schema(i: int) -> dict[str, Any]:
    names = [f"name_{i}_{j}" for j in range(4)]
    return {"type": "object", "properties": {n: {"type": "string", "maxLength": 20} for n in names}, "required": names}


def deep(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


ATTACKS: dict[str, tuple[str, str]] = {
    "nested repetition": ("regex", "(a+)+b"),
    "30k parentheses": ("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "repeated thousands": ("regex", "(((a{1000}){1000}){1000}){1000}b*"),
    "self reference": ("json", '{"$ref":"#"}'),
    "references in a ring": (
        "json",
        json.dumps({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    ),
    "100k enum": ("json", json.dumps({"enum": [f"value {i}" for i in range(100_000)]})),
    "deep schema": ("json", deep(20_000)),
    "undefined rule": ("grammar", "start: nothing"),
    "open parenthesis": ("regex", "(a"),
    "broken EBNF": ("grammar", "root ::= ("),
    "unknown type": ("json", '{"type":"strng"}'),
    "30k parentheses in a grammar": ("grammar", "start: " + "(" * 30_000 + '"a"' + ")" * 30_000),
}
EITHER_WAY = {"repeated thousands"}  # a library that counts rather than unrolls may take it


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_within_five_seconds(llm: LLM, name: str) -> None:
    kind, text = ATTACKS[name]
    llm.generate("Hi", held(StructuredOutputParams(choice=("a",))), use_tqdm=False)  # the worker is up
    started = time.monotonic()
    error = None
    try:
        llm.generate("Hi", held(StructuredOutputParams(**{kind: text})), use_tqdm=False)  # type: ignore[arg-type]
    except ValueError as raised:
        error = str(raised)
    assert name in EITHER_WAY if error is None else len(error) < 500
    assert time.monotonic() - started < LIMIT_S
    assert llm.generate("Hi", held(StructuredOutputParams(choice=("b",))), use_tqdm=False)[0].outputs[0].text == "b"


def held(spec: StructuredOutputParams) -> SamplingParams:
    return SamplingParams(max_tokens=8, structured_outputs=spec)


@pytest.mark.parametrize("name", ATTACKS)
def test_the_worker_itself_stands_every_attack(checker: Checker, backend_name: str, name: str) -> None:
    assert checker.check(backend_name, "regex", "a") is None
    pid = checker.pid
    started = time.monotonic()
    error = checker.check(backend_name, *ATTACKS[name])
    assert error or name in EITHER_WAY
    assert time.monotonic() - started < LIMIT_S
    assert checker.check(backend_name, "regex", "a") is None
    assert checker.pid == pid


def test_a_dead_worker_is_replaced(checker: Checker) -> None:
    assert checker.check("llguidance", "regex", "a") is None
    assert checker.pid is not None
    os.kill(checker.pid, signal.SIGKILL)
    assert "compiled" in str(checker.check("llguidance", "regex", "b"))
    assert checker.check("llguidance", "regex", "b") is None


def test_a_check_can_be_cancelled(vocabulary: Vocabulary) -> None:
    checker = Checker(vocabulary, timeout_s=30)
    assert checker.check("llguidance", "regex", "a") is None
    timer = threading.Timer(0.3, checker.cancel)
    timer.start()
    started = time.monotonic()
    answer = checker.check("llguidance", "json", json.dumps({"enum": [f"v {i}" for i in range(60_000)]}) + " " * 9)
    assert answer == CANCELLED or time.monotonic() - started < 0.3
    timer.join()
    checker.cancel()
    assert checker.check("llguidance", "regex", "a") is None
    checker.close()


def test_closing_does_not_wait_for_a_check(compiler: Compiler) -> None:
    compiler.compile(StructuredOutputParams(regex="a"))
    queue = CompileQueue(compiler)
    queue.put("x", StructuredOutputParams(regex="(((a{1000}){1000}){1000}){1000}b"))
    time.sleep(0.2)
    started = time.monotonic()
    queue.close()
    assert time.monotonic() - started < 1


def test_a_worker_ends_with_its_engine(vocabulary: Vocabulary) -> None:
    checker = Checker(vocabulary)
    checker.check("llguidance", "regex", "a")
    pid = checker.pid
    del checker
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


def test_equal_specifications_compile_once(compiler: Compiler) -> None:
    first = compiler.compile(StructuredOutputParams(json=schema(1)))
    assert compiler.compile(StructuredOutputParams(json=json.dumps(schema(1), indent=2))) is first
    assert compiler.cached(StructuredOutputParams(json=schema(1))) is first
    assert compiler.cached(StructuredOutputParams(json=schema(2))) is None
    assert len(compiler.cache) == 1


def test_a_bad_specification_is_tried_once(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with pytest.raises(RequestError, match="structured_outputs"):
            compiler.compile(StructuredOutputParams(regex="(a"))
        monkeypatch.setattr(Checker, "check", lambda *_: pytest.fail("it was tried again"))


class Sized:
    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def start(self) -> Any:
        raise AssertionError("never started")


def test_the_cache_keeps_what_was_used_last() -> None:
    cache = GrammarCache(100)
    for key in (b"a", b"b"):
        cache.put(key, Sized(40))
    assert cache.get(b"a") is not None
    cache.put(b"c", Sized(40))
    assert (cache.get(b"b"), len(cache), cache.num_bytes) == (None, 2, 80)
    cache.put(b"d", Sized(101))
    assert cache.get(b"d") is None
    cache.put(b"a", Sized(10))
    assert cache.num_bytes == 50


def rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def test_ten_thousand_schemas_leave_no_more_than_the_cache(
    vocabulary: Vocabulary, backend_name: str, count: Callable[..., int]
) -> None:
    compiler = Compiler((backend_name,), lambda: vocabulary)
    compiler.compile(StructuredOutputParams(json=schema(-1)))
    before = rss_mib()
    for i in range(count(150, full=10_000)):
        compiler.compile(StructuredOutputParams(json=schema(i))).start()
        assert compiler.cache.num_bytes <= compiler.cache.max_bytes
    assert rss_mib() - before < 64
    compiler.close()


def test_a_queue_gives_results_in_order_and_forgets_the_cancelled(compiler: Compiler) -> None:
    queue = CompileQueue(compiler)
    for i, regex in enumerate(("a", "(b", "c", "d")):
        queue.put(str(i), StructuredOutputParams(regex=regex))
    queue.cancel("2")
    found: list[tuple[str, bool]] = []
    deadline = time.monotonic() + 20
    while len(found) < 3 and time.monotonic() < deadline:
        queue.wait(0.1)
        while (entry := queue.take()) is not None:
            found.append((entry[0], isinstance(entry[1], RequestError)))
    assert found == [("0", False), ("1", True), ("3", False)]
    queue.close()


def test_a_broken_library_is_told_to_the_request(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch, vocabulary: Vocabulary
) -> None:
    monkeypatch.setattr(Compiler, "compile", lambda *_: 1 / 0)
    queue = CompileQueue(compiler)
    queue.put("x", StructuredOutputParams(regex="a"))
    queue.wait(10)
    entry = queue.take()
    assert entry is not None
    assert "library failed: ZeroDivisionError" in str(entry[1])
    queue.close()


def test_the_preferred_library_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed_backends", lambda: ("xgrammar", "llguidance"))
    assert backend_names("auto") == backend_names("xgrammar") == ("xgrammar", "llguidance")
    assert backend_names("llguidance") == ("llguidance",)
    names = backend_names("auto")
    assert choose_backend(names, "json", '{"type":"string"}') == "xgrammar"
    assert choose_backend(names, "json", '{"oneOf":[{"type":"string"}]}') == "llguidance"
    assert choose_backend(names, "regex", "a") == "xgrammar"
    monkeypatch.setattr(backends, "installed_backends", lambda: ("llguidance",))
    with pytest.raises(ConfigError, match="xgrammar"):
        backend_names("xgrammar")


def test_without_a_tokenizer_there_is_no_grammar(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm("auto", skip_tokenizer_init=True)
    with pytest.raises(RequestError, match="without a tokenizer"):
        llm.generate([1, 2], held(StructuredOutputParams(regex="a")), use_tqdm=False)
    llm.close()


def test_without_a_library_there_is_no_grammar(make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "installed_backends", tuple)
    llm = make_llm("auto")
    with pytest.raises(RequestError, match="pip install llguidance"):
        llm.generate("Hi", held(StructuredOutputParams(regex="a")), use_tqdm=False)
    llm.close()
