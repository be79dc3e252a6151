"""The native kernels under AddressSanitizer and UndefinedBehaviorSanitizer: their own tests, in another build."""

import importlib.util
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fairlead_cpu import native

ROOT = Path(__file__).parents[2]
CPU = ROOT / "platforms" / "cpu"
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1", "-fno-omit-frame-pointer")
FULL = os.environ.get("FAIRLEAD_TEST_FULL") == "1"
# Each has code of its own: the full count takes every one that this machine can run, the quick one the last but plain.
ISAS = native.usable() if FULL else native.usable()[-2:][:1]
TESTS = (
    "test_cpu_linear.py",
    "test_cpu_native.py",
    "test_cpu_ops.py",
    "test_native_attention.py",
    "test_cpu_attention.py",
    "test_cpu_sampling.py",
    "test_cpu_moe.py",
)
# The quick count goes once through each kernel's odd sizes. It compiles without optimisation, in a third of the time
# that -O1 takes (16 s of processor time against 46), which lets the loops over long contexts take minutes.
QUICK = (
    "(apply_is_a_product and (bfloat16 or unquantized)) or (gate_and_up and gelu) or strided_and_empty"
    " or (provider_equals_reference and sliced) or copied_blocks or empty_step or adapters_are or mask_is"
    " or (in_one_call and eight and bfloat16)"
    " or penalties_are or (filtered_tokens and 257) or (kinds_of_attention and latent)"
)
# ASan's own allocator may be locked in a fork of several threads.
LEVEL, CHOSEN = ("-O1", "not fork") if FULL else ("-O0", QUICK)
RUN = """
import sys
from pathlib import Path
import pytest

class Build:
    def pytest_configure(self):  # not sooner: pytest rewrites a plugin's package before it is imported
        from fairlead_cpu import native
        native._LIB = Path(sys.argv[1])
        assert native.usable() == (sys.argv[2],)

raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-x", *sys.argv[3:]], plugins=[Build()]))
"""


def sanitizer_library() -> str | None:
    """What has to be loaded first into a process whose program was built without the sanitizer."""
    try:
        run = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    path = Path(run.stdout.strip())
    return str(path) if path.is_absolute() and path.is_file() else None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sanitizer is preloaded the way of Linux")
@pytest.mark.skipif(sanitizer_library() is None, reason="the C++ compiler (c++) has no libasan.so")
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_touch_nothing_that_is_not_theirs(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("fairlead_cpu_hatch_build", CPU / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    machine = platform.machine()
    monkeypatch.setattr(hook, "ISA_FLAGS", {machine: {isa: hook.ISA_FLAGS.get(machine, {"generic": ()})[isa]}})
    monkeypatch.delenv("FAIRLEAD_CPU_SKIP_KERNELS", raising=False)
    hook.compile_kernels(CPU / "csrc", tmp_path / "lib", machine, extra_flags=(*FLAGS, LEVEL))
    environment = {
        **os.environ,
        "LD_PRELOAD": str(sanitizer_library()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FAIRLEAD_CPU_ISA": isa,
    }
    tests = [str(ROOT / "tests" / "platforms" / name) for name in TESTS]
    command = [sys.executable, "-c", RUN, str(tmp_path / "lib"), isa, *tests]
    command += ["-k", CHOSEN, "--capture=sys"]  # what the sanitizer says goes past Python
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]
    assert " passed" in run.stdout
