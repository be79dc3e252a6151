"""Compiles Triton kernels ahead of time for devices that are not here, and says what they take of them.

As a module: `compile_cases`, in one child process, since this one may run kernels in Triton's interpreter, whose
functions cannot be compiled. As a program: reads cases from standard input, writes results to its output.
"""

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

KIB = 1024
NVIDIA = ("sm_80", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100")
TARGETS = NVIDIA + AMD

SHARED_BYTES = {
    "sm_80": 163 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx90a": 64 * KIB,
    "gfx942": 64 * KIB,
    "gfx950": 160 * KIB,
    "gfx1100": 64 * KIB,
}
"""Shared memory (LDS) that one workgroup may have, by target."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One specialisation of one kernel.

    `kernel` is "module:function". `signature` gives the type of each runtime argument ("*bf16", "i32", "fp32");
    `constexprs` the value of each of the others, where "tl.float16" and the like mean that object. `aligned` names the
    arguments that are multiples of 16 bytes (None: all pointers). `max_spills` holds the bounds in bytes (NVIDIA) or
    registers (AMD), by target, of what may be spilled there; anywhere else nothing may. `label` tells cases of one
    kernel apart.
    """

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, int | float | bool | str | None] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] | None = None
    label: str = ""
    max_spills: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the test is called."""
        return ":".join(part for part in (self.kernel.removeprefix("fairlead_triton."), self.label) if part)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler said; `error` is its last line if it gave up. `spills` as in Case.max_spills."""

    target: str
    name: str
    shared_bytes: int = 0
    spills: int = 0
    registers: int = 0
    seconds: float = 0.0
    error: str | None = None

    def check(self, case: Case) -> None:
        """Asserts that it compiled, fits into shared memory and spills no more than the case allows."""
        assert self.error is None, f"{self.name} for {self.target}: {self.error}"
        assert self.shared_bytes <= SHARED_BYTES[self.target], (self, SHARED_BYTES[self.target])
        assert self.spills <= case.max_spills.get(self.target, 0), self
        assert self.registers > 0, self  # so the log was read, and its spills are not 0 for want of it


def compile_cases(wanted: Sequence[tuple[str, Case]]) -> dict[tuple[str, str], Compiled]:
    """Compiles (target, case) pairs in a child process with a cache of its own; results by (target, name)."""
    if not wanted:
        return {}
    tasks = [{"target": target, "case": asdict(case)} for target, case in wanted]
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {
            "TRITON_ALWAYS_COMPILE": "1",
            "TRITON_CACHE_DIR": cache,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        child = subprocess.run(
            [sys.executable, str(Path(__file__))],
            input=json.dumps(tasks),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert child.returncode == 0, child.stderr[-2000:]
    results = [Compiled(**entry) for entry in json.loads(child.stdout.splitlines()[-1])]
    return {(result.target, result.name): result for result in results}


def _target(name: str):  # type: ignore[no-untyped-def]  # triton has no types
    from triton.backends.compiler import GPUTarget

    if name in NVIDIA:
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 32 if name.startswith("gfx1") else 64)


def _compile(target: str, case: Case) -> Compiled:
    import triton
    import triton.language as tl
    from triton.compiler import ASTSource

    module, _, function = case.kernel.partition(":")
    fn = getattr(importlib.import_module(module), function)
    values = {
        k: getattr(tl, v.removeprefix("tl.")) if isinstance(v, str) and v.startswith("tl.") else v
        for k, v in case.constexprs.items()
    }
    unknown = set(case.signature) | set(values)
    assert unknown == set(fn.arg_names), f"{case.name}: arguments {unknown ^ set(fn.arg_names)} do not match"
    signature = {name: case.signature.get(name, "constexpr") for name in fn.arg_names}
    aligned = case.aligned
    if aligned is None:
        aligned = tuple(name for name, kind in case.signature.items() if kind.startswith("*"))
    attrs = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn, signature, values, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    log = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(log):  # ptxas -v, since TRITON_DUMP_PTXAS_LOG is on
        compiled = triton.compile(source, target=_target(target), options=options)
    seconds = time.perf_counter() - start
    text = log.getvalue() if target in NVIDIA else compiled.asm["amdgcn"]
    if target in NVIDIA:
        spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", text)))
        registers = max(map(int, re.findall(r"Used (\d+) registers", text)), default=0)
    else:
        spills = sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)))
        registers = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", text)), default=0)
    return Compiled(
        target=target,
        name=case.name,
        shared_bytes=compiled.metadata.shared,
        spills=spills,
        registers=registers,
        seconds=round(seconds, 3),
    )


def _main() -> None:
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    results = []
    for task in json.load(sys.stdin):
        task["case"]["aligned"] = None if task["case"]["aligned"] is None else tuple(task["case"]["aligned"])
        case = Case(**task["case"])
        try:
            result = _compile(task["target"], case)
        except Exception as error:  # whatever the compiler raises is the result
            lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
            result = Compiled(target=task["target"], name=case.name, error=f"{type(error).__name__}: {lines[-1]}")
        results.append(asdict(result))
    print(json.dumps(results))


if __name__ == "__main__":
    _main()
