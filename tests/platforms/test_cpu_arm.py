"""The kernels' libraries for 64-bit ARM, cross-compiled and run by qemu: they give what this machine's kernels gave."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fairlead_cpu import native

ROOT = Path(__file__).parents[2]
CPU = ROOT / "platforms" / "cpu"
HERE = Path(__file__).parent / "arm"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
FULL = os.environ.get("FAIRLEAD_TEST_FULL") == "1"
# The processor that each library is for and that has no more than it needs.
PROCESSORS = {"neon_bf16": "max", "neon": "cortex-a53", "generic": "cortex-a53"}
ISAS = tuple(PROCESSORS)
TESTS = (
    *("test_cpu_linear.py", "test_cpu_ops.py", "test_cpu_attention.py", "test_native_attention.py"),
    *("test_cpu_sampling.py", "test_cpu_moe.py"),
)
CHOSEN = (
    "apply_is_a_product or gate_and_up or activation_and_residual or activations_over or numbers_that_are_none"
    " or provider_equals_reference or rows_do_not_depend or kinds_of_attention or head_ratios or of_the_reference"
    " or cache_of_8_bits or (in_one_call and not int8)"  # int8 rounds anew between its two layers
)
RUN = """
import sys
import pytest

class Recorded:
    def pytest_configure(self):  # not sooner: pytest rewrites a plugin's package before it is imported
        sys.path.insert(0, sys.argv[1])
        from recording import install
        install(isa=sys.argv[2], path=sys.argv[3])

raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "-x", *sys.argv[4:]], plugins=[Recorded()]))
"""
pytestmark = [
    pytest.mark.skipif(not FULL, reason="emulates another processor for minutes; make test-full runs it"),
    pytest.mark.skipif(bool(MISSING), reason=f"no {' and no '.join(MISSING)}; CONTRIBUTING.md says how to get them"),
    pytest.mark.skipif(not native.usable(), reason="fairlead-cpu was built without kernels"),
]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the calls of the kernels' tests read and wrote on this machine."""
    path, isa = tmp_path_factory.mktemp("arm") / "record", native.usable()[-2:][0]
    tests = [str(HERE.parent / name) for name in TESTS]
    command = [sys.executable, "-c", RUN, str(HERE), isa, str(path), *tests, "-k", CHOSEN]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]
    assert path.stat().st_size > 1_000_000
    return path


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("arm") / "driver"
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror")
    subprocess.run([COMPILER, *flags, "-o", str(path), str(HERE / "driver.cpp"), "-ldl"], check=True)
    return path


def compile_library(isa: str, lib: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    spec = importlib.util.spec_from_file_location("fairlead_cpu_hatch_build", CPU / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    monkeypatch.setenv("CXX", COMPILER)
    monkeypatch.delenv("FAIRLEAD_CPU_SKIP_KERNELS", raising=False)
    monkeypatch.setattr(hook, "ISA_FLAGS", {"aarch64": {isa: hook.ISA_FLAGS["aarch64"][isa]}})
    (library,) = hook.compile_kernels(CPU / "csrc", lib, "aarch64", extra_flags=("-Wall", "-Wextra", "-Werror"))
    assert isinstance(library, Path)
    return library


@pytest.mark.parametrize("isa", ISAS)
def test_the_same_calls_give_the_same_results(
    isa: str, record: Path, driver: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = compile_library(isa, tmp_path / "lib", monkeypatch)
    root = f"/usr/{COMPILER.removesuffix('-g++')}"
    command = [EMULATOR, "-cpu", PROCESSORS[isa], "-L", root, str(driver), str(library), isa, str(record)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, (run.stdout + run.stderr)[-8000:]
    print(run.stdout)
    for function in ("fl_linear", "fl_attention", "fl_rms_norm", "fl_rotary", "fl_draw_filtered", "fl_lora_expand"):
        assert f"{isa} {function}: " in run.stdout
