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
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SKIP_VARIABLE = "FAIRLEAD_CPU_SKIP_KERNELS"
COMPILERS = ("c++", "g++", "clang++")
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden")
# The platform picks one of these at load, by what the processor has; other machines build "generic".
ISA_FLAGS = {
    "x86_64": {
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    },
}


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


def compile_kernels(csrc: Path, lib: Path, machine: str = platform.machine()) -> list[Path]:
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
    libraries = []
    for isa, flags in ISA_FLAGS.get(machine, {"generic": ()}).items():
        library = lib / f"libfairlead_cpu_{isa}.so"
        command = [*compiler, *COMMON_FLAGS, *flags, "-o", str(library), *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            shutil.rmtree(lib)
            raise KernelBuildError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}")
        libraries.append(library)
    return libraries


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
