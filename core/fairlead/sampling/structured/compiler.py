"""Specifications to grammars: tried out in the worker, compiled here, kept in a cache that is bounded by bytes."""

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from fairlead.errors import RequestError
from fairlead.sampling.structured.backend import (
    XGRAMMAR,
    Backend,
    Grammar,
    GrammarError,
    Vocabulary,
    choose_backend,
    create_backend,
    digest_of,
)
from fairlead.sampling.structured.checker import CANCELLED, Checker
from fairlead.sampling.structured.params import StructuredOutputParams, spec_error

CACHE_BYTES = 16 << 20
_MAX_VERDICTS = 4096
_MAX_READY = 64  # grammars that are compiled ahead of the engine


class GrammarCache:
    """The grammars that were used last, as many as `max_bytes` hold. Safe to use from several threads."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._grammars: OrderedDict[bytes, Grammar] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._grammars)

    def get(self, digest: bytes) -> Grammar | None:
        """The grammar, which is then the newest one."""
        with self._lock:
            found = self._grammars.get(digest)
            if found is not None:
                self._grammars.move_to_end(digest)
            return found

    def put(self, digest: bytes, grammar: Grammar) -> None:
        """Keeps the grammar, unless it is larger than the whole cache, and lets go of the oldest ones."""
        if grammar.size_bytes > self.max_bytes:
            return
        with self._lock:
            replaced = self._grammars.pop(digest, None)
            self._grammars[digest] = grammar
            self.num_bytes += grammar.size_bytes - (0 if replaced is None else replaced.size_bytes)
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._grammars.popitem(last=False)[1].size_bytes


class Compiler:
    """Checks and compiles specifications. `check` and `compile` are called by one thread at a time; they take turns."""

    def __init__(
        self, backends: tuple[str, ...], vocabulary: Callable[[], Vocabulary], *, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """`backends` are installed, the preferred one first. The vocabulary is asked for with the first use."""
        self.cache = GrammarCache(cache_bytes)
        self._names, self._open_vocabulary = backends, vocabulary
        self._vocabulary: Vocabulary | None = None
        self._checker: Checker | None = None
        self._backends: dict[str, Backend] = {}
        self._verdicts: OrderedDict[bytes, str | None] = (
            OrderedDict()
        )  # what is wrong with a specification, if anything
        self._turn = threading.RLock()

    def warm_up(self) -> None:
        """Starts the worker in the background if its import takes seconds: bad specifications are refused in time."""
        if self._names and self._names[0] == XGRAMMAR:
            spec = StructuredOutputParams(choice=("yes", "no"))
            threading.Thread(target=self._warm_up, args=(spec,), name="fairlead-warm-up", daemon=True).start()

    def _warm_up(self, spec: StructuredOutputParams) -> None:
        with contextlib.suppress(RequestError):  # a request will meet the same and tell
            self.check(spec)

    def check(self, spec: StructuredOutputParams) -> None:
        """Raises RequestError, within some seconds whatever was asked, if the specification cannot be compiled."""
        with self._turn:
            backend, digest = self._find(spec)
            if self.cache.get(digest) is None:
                self._check(backend, spec, digest)

    def compile(self, spec: StructuredOutputParams) -> Grammar:
        """The grammar, from the cache or compiled after it was checked. Raises RequestError as `check` does."""
        with self._turn:
            name, digest = self._find(spec)
            found = self.cache.get(digest)
            if found is not None:
                return found
            self._check(name, spec, digest)
            if name not in self._backends:
                self._backends[name] = create_backend(name, self.vocabulary)
            try:
                grammar = self._backends[name].compile(spec.kind, spec.text)
            except GrammarError as error:
                raise spec_error(str(error)) from error
            self.cache.put(digest, grammar)
            return grammar

    def cached(self, spec: StructuredOutputParams) -> Grammar | None:
        """The grammar, if it is at hand; never waits."""
        return self.cache.get(self._find(spec)[1])

    def cancel(self) -> None:
        """Ends a check that another thread waits for: it raises RequestError."""
        if self._checker is not None:
            self._checker.cancel()

    def close(self) -> None:
        """Ends the worker, and with it a check that another thread waits for."""
        if self._checker is not None:
            self._checker.kill()
        with self._turn:
            if self._checker is not None:
                self._checker.close()

    @property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens, read with the first use."""
        if self._vocabulary is None:
            self._vocabulary = self._open_vocabulary()
        return self._vocabulary

    def _find(self, spec: StructuredOutputParams) -> tuple[str, bytes]:
        name = choose_backend(self._names, spec.kind, spec.text)
        return name, digest_of(name, spec.kind, spec.text)

    def _check(self, backend: str, spec: StructuredOutputParams, digest: bytes) -> None:
        if digest not in self._verdicts:
            if self._checker is None:
                self._checker = Checker(self.vocabulary)
            verdict = self._checker.check(backend, spec.kind, spec.text)
            if verdict == CANCELLED:
                raise spec_error(CANCELLED)
            self._verdicts[digest] = verdict
            while len(self._verdicts) > _MAX_VERDICTS:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(digest)
        verdict = self._verdicts[digest]
        if verdict is not None:
            raise spec_error(verdict)


class CompileQueue:
    """Compiles for requests in a thread of its own, in order; the engine's thread puts in, takes out and cancels."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._jobs: deque[tuple[str, StructuredOutputParams]] = deque()
        self._ready: deque[tuple[str, Grammar | RequestError]] = deque()
        self._running: str | None = None
        self._closed = False
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None

    def put(self, request_id: str, spec: StructuredOutputParams) -> None:
        """Queues a specification; its result comes out of `take` with the id."""
        with self._news:
            self._jobs.append((request_id, spec))
            self._news.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fairlead-grammars", daemon=True)
                self._thread.start()

    def cancel(self, request_id: str) -> None:
        """Forgets a request; a compilation that runs for it is ended."""
        with self._news:
            self._jobs = deque(job for job in self._jobs if job[0] != request_id)
            self._ready = deque(entry for entry in self._ready if entry[0] != request_id)
            if self._running == request_id:
                self._running = None
                self._compiler.cancel()  # under the lock, so that it cannot meet the next job's check
            self._news.notify_all()

    def take(self) -> tuple[str, Grammar | RequestError] | None:
        """The oldest result, if there is one."""
        with self._news:
            if not self._ready:
                return None
            self._news.notify_all()
            return self._ready.popleft()

    def wait(self, timeout_s: float) -> None:
        """Waits for a result."""
        with self._news:
            self._news.wait_for(lambda: bool(self._ready), timeout_s)

    def close(self) -> None:
        """Ends the thread and the worker."""
        with self._news:
            self._closed = True
            self._jobs.clear()
            self._news.notify_all()
        self._compiler.close()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or (bool(self._jobs) and len(self._ready) < _MAX_READY))
                if self._closed:
                    return
                self._running, spec = request_id, _ = self._jobs.popleft()
            result = self._compile(spec)
            with self._news:
                if self._running == request_id:  # nobody has cancelled it
                    self._ready.append((request_id, result))
                self._running = None
                self._news.notify_all()

    def _compile(self, spec: StructuredOutputParams) -> Grammar | RequestError:
        try:
            return self._compiler.compile(spec)
        except RequestError as error:
            return error
        except BaseException as error:  # a broken installation, or a panic: the request is told, the engine goes on
            return spec_error(f"the grammar library failed: {type(error).__name__}: {error!s:.200}")
