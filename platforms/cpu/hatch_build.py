"""Build hook: compiles csrc/*.cpp once per instruction set into plain shared libraries under fairlead_cpu/lib.

The libraries export `extern "C"` functions on raw pointers and link neither Python nor torch, so one wheel serves every
version of both and an isolated build downloads neither. Without sources the hook does nothing. With sources it needs a
C++ compiler (`CXX`, or the system's); FAIRLEAD_CPU_SKIP_KERNELS=1 asks for a build without them.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SKIP_VARIABLE = "FAIRLEAD_CPU_SKIP_KERNELS"
COMPILERS = ("c++", "g++", "clang++")
# Contraction off: a multiply-add is fused where the source says so and nowhere else, so the same row gives the same
# bits in a kernel's main loop and in its tail.
COMMON_FLAGS = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-pthread",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
_AVX512VNNI = (*_AVX512, "-mavx512vnni")
_AVX512BF16 = (*_AVX512VNNI, "-mavx512bf16", "-mavx512vbmi")
_NEON_BF16 = "-march=armv8.2-a+dotprod+i8mm+bf16"
# What to compile for each machine. The platform picks one of these at load, by what the processor has
# (fairlead_cpu/native.py). One that the compiler does not know is left out and named.
ISA_FLAGS = {
    "x86_64": {
        "generic": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512vnni": _AVX512VNNI,
        "avx512bf16": _AVX512BF16,
        "amx": (*_AVX512BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
    },
    "aarch64": {"generic": (), "neon": (), "neon_bf16": (_NEON_BF16,)},
    "arm64": {"generic": (), "neon": (), "neon_bf16": (_NEON_BF16,)},
}
# The portable sources are compiled without the vector types of ARM's base instruction set in "generic" only.
ISA_DEFINES = {"generic": ("-DFL_PORTABLE",)}


class KernelBuildError(Exception):
    """The native kernels could not be compiled; the message says why and what to do."""


def find_compiler() -> list[str]:
    """The command of the C++ compiler: `CXX` if set, else the first of COMPILERS on the path.

    Raises KernelBuildError where there is none.
    """
    asked = os.environ.get("CXX")
    for command in [shlex.split(asked)] if asked else [[name] for name in COMPILERS]:
        if command and shutil.which(command[0]):
            return command
    looked_for = f"CXX={asked}" if asked else ", ".join(COMPILERS)
    raise KernelBuildError(
        f"fairlead-cpu has native kernels, and no C++ compiler was found (looked for {looked_for}). Install one "
        f"(Debian, Ubuntu: apt install g++), or set {SKIP_VARIABLE}=1 to build without kernels: "
        "the reference ops then run in their place, many times slower."
    )


def compile_kernels(
    csrc: Path, lib: Path, machine: str = platform.machine(), *, extra_flags: tuple[str, ...] = ()
) -> list[Path]:
    """Compiles all of csrc/*.cpp into one library per instruction set of the machine, replacing what lib holds.

    Returns the libraries; none where there is no source or the user asked to skip them. Raises KernelBuildError.
    """
    shutil.rmtree(lib, ignore_errors=True)
    sources = sorted(csrc.glob("*.cpp"))
    if not sources:
        return []
    if os.environ.get(SKIP_VARIABLE) == "1":
        print(f"warning: {SKIP_VARIABLE}=1: fairlead-cpu is built without its native kernels", file=sys.stderr)
        return []
    compiler = find_compiler()
    lib.mkdir(parents=True)
    variants = {
        isa: (*COMMON_FLAGS, *flags, *ISA_DEFINES.get(isa, ()), *extra_flags)
        for isa, flags in ISA_FLAGS.get(machine, {"generic": ()}).items()
        if _accepts(compiler, isa, flags)
    }
    try:
        with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = {isa: [Path(scratch) / f"{isa}_{source.stem}.o" for source in sources] for isa in variants}
            compiled = [
                pool.submit(_run, [*compiler, *flags, "-c", "-o", str(target), str(source)])
                for isa, flags in variants.items()
                for source, target in zip(sources, objects[isa], strict=True)
            ]
            try:
                for job in compiled:
                    job.result()
            finally:
                pool.shutdown(cancel_futures=True)
            libraries = {isa: lib / f"libfairlead_cpu_{isa}.so" for isa in variants}
            for isa, library in libraries.items():
                _run([*compiler, *variants[isa], "-shared", "-o", str(library), *map(str, objects[isa])])
    except KernelBuildError:
        shutil.rmtree(lib)
        raise
    return sorted(libraries.values())


def _accepts(compiler: list[str], isa: str, flags: tuple[str, ...]) -> bool:
    """Whether the compiler knows the flags; all of them know none."""
    if not flags:
        return True
    command = [*compiler, *flags, "-Werror", "-x", "c++", "-fsyntax-only", os.devnull]
    accepted = subprocess.run(command, capture_output=True).returncode == 0
    if not accepted:
        print(f"warning: {shlex.join(compiler)} does not know {shlex.join(flags)}: no {isa} kernels", file=sys.stderr)
    return accepted


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise KernelBuildError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}")


class KernelBuildHook(BuildHookInterface[Any]):
    """Puts the libraries into the wheel and tags it for this operating system and machine, for any Python."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        libraries = compile_kernels(root / "csrc", root / "fairlead_cpu" / "lib")
        if not libraries:
            return
        build_data["artifacts"] += [f"/{library.relative_to(root).as_posix()}" for library in libraries]
        build_data["pure_python"] = False
        system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{system}"
