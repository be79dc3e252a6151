"""The native library: which one is taken, its threads, and the pool they run in."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fairlead.errors import ConfigError
from fairlead_cpu import native, topology

FN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
needs_library = pytest.mark.skipif(not native.usable(), reason="fairlead-cpu was built without kernels")


@pytest.fixture(scope="module")
def three_threads() -> Iterator[native.Kernels]:
    """The plainest library, which the other tests' engines do not use, with three threads."""
    layout = topology.Layout(cpus=(-1, -1, -1), bound=False, reason="test")
    kernels = native.Kernels(native.usable()[-1], layout)
    yield kernels
    kernels.call.fl_pool_shutdown()


def parallel_for(kernels: native.Kernels, n: int, fn: Callable[[int, int], None]) -> None:
    kernels.library.fl_parallel_for(ctypes.c_int64(n), FN(lambda ctx, begin, end: fn(begin, end)), None)


@needs_library
@pytest.mark.parametrize("n", [0, 1, 2, 3, 23, 24, 25, 1000])
def test_a_job_covers_its_range_once(three_threads: native.Kernels, n: int) -> None:
    assert three_threads.call.fl_pool_num_threads() == 3
    for _ in range(20):
        done: list[int] = []
        parallel_for(three_threads, n, lambda begin, end, done=done: done.extend(range(begin, end)))
        assert sorted(done) == list(range(n))


@needs_library
def test_several_threads_take_part(three_threads: native.Kernels) -> None:
    barrier = threading.Barrier(3, timeout=30)
    seen: set[int] = set()

    def meet(begin: int, end: int) -> None:
        if threading.get_ident() not in seen:
            seen.add(threading.get_ident())
            barrier.wait()  # ends when the three are inside at once

    parallel_for(three_threads, 3 * 8, meet)
    assert len(seen) == 3


@needs_library
def test_jobs_inside_jobs_and_beside_them_end(three_threads: native.Kernels) -> None:
    counts = [0] * 4

    def caller(k: int) -> None:
        def inner(begin: int, end: int) -> None:
            counts[k] += end - begin

        for _ in range(50):
            parallel_for(three_threads, 10, lambda b, e: parallel_for(three_threads, 1, inner))

    # the interpreter's lock makes += on the list safe: callbacks hold it
    threads = [threading.Thread(target=caller, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert all(count >= 50 for count in counts)


@needs_library
def test_a_pool_can_be_resized_and_ended(three_threads: native.Kernels) -> None:
    for num_threads in (1, 2, 3):
        three_threads.call.fl_pool_init(num_threads, None)
        assert three_threads.call.fl_pool_num_threads() == num_threads
    three_threads.call.fl_pool_shutdown()
    ranges: list[tuple[int, int]] = []
    parallel_for(three_threads, 7, lambda begin, end: ranges.append((begin, end)))
    assert ranges == [(0, 7)]
    three_threads.call.fl_pool_init(3, None)


@needs_library
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    code = """
import ctypes, os
from fairlead_cpu import native, topology
kernels = native.Kernels(native.usable()[-1], topology.Layout(cpus=(-1, -1), bound=False, reason="test"))
FN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
def total():
    sizes = []
    kernels.library.fl_parallel_for(ctypes.c_int64(100), FN(lambda ctx, begin, end: sizes.append(end - begin)), None)
    return sum(sizes)
assert total() == 100
child = os.fork()
assert total() == 100
if child == 0:
    os._exit(7 if kernels.call.fl_pool_num_threads() == 2 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@needs_library
@pytest.mark.parametrize("isa", native.usable())
def test_the_environment_chooses_a_library(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLEAD_CPU_ISA", isa)
    assert native.choose() == isa


def test_an_instruction_set_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLEAD_CPU_ISA", "z80")
    with pytest.raises(ConfigError, match="FAIRLEAD_CPU_ISA=z80: this machine can run "):
        native.choose()


def test_the_best_library_that_was_built_and_that_the_processor_has_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for isa in ("generic", "avx2", "avx512"):
        (tmp_path / f"libfairlead_cpu_{isa}.so").touch()
    zen4 = native._NEEDS["avx512bf16"]
    monkeypatch.setattr(native, "_LIB", tmp_path)
    monkeypatch.setattr(native, "_features", lambda: zen4)
    assert native.usable() == ("avx512", "avx2", "generic")
    monkeypatch.setattr(native, "_features", lambda: zen4 - {"avx512f"})
    assert native.usable() == ("avx2", "generic")
    monkeypatch.setattr(native, "_features", frozenset)
    assert native.usable() == ("generic",)
    monkeypatch.setattr(native, "_LIB", tmp_path / "nowhere")
    assert native.usable() == ()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four hardware threads, two to a core (0 and 2, 1 and 3), no quota."""
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    monkeypatch.setattr(topology, "_CPUS", tmp_path)
    monkeypatch.setattr(topology, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("FAIRLEAD_CPU_THREADS", raising=False)
    return tmp_path


def test_one_thread_per_core(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(topology.layout()) == "2 threads (2 cores of 4 hardware threads, workers bound to 1)"
    (machine / "cpu.max").write_text("max 100000\n")
    assert topology.layout().cpus == (0, 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2, 3})
    assert topology.layout().cpus == (1, 2)


def test_a_quota_below_the_cores_limits_the_threads_and_binds_none(machine: Path) -> None:
    (machine / "cpu.max").write_text("50000 100000\n")
    assert str(topology.layout()) == "1 threads (control group quota of 1 cores)"
    (machine / "cpu.max").write_text("400000 100000\n")
    assert topology.layout().bound


def test_a_number_that_was_asked_for(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert topology.layout().cpus == (0,)
    monkeypatch.setenv("FAIRLEAD_CPU_THREADS", "3")
    assert topology.layout() == topology.Layout(cpus=(0, 1, 2), bound=True, reason="FAIRLEAD_CPU_THREADS=3")
    monkeypatch.setenv("FAIRLEAD_CPU_THREADS", "5")
    assert topology.layout() == topology.Layout(cpus=(0, 1, 2, 3, -1), bound=False, reason="FAIRLEAD_CPU_THREADS=5")
    monkeypatch.setenv("FAIRLEAD_CPU_THREADS", "many")
    with pytest.raises(ConfigError, match="FAIRLEAD_CPU_THREADS=many: expected a number of threads above 0"):
        topology.layout()
