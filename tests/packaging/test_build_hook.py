"""The build hook of platforms/cpu compiles C++ into libraries that ctypes can load, or says loudly why not."""

import ctypes
import importlib.util
import platform
import shutil
import types
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

CPU = Path(__file__).parents[2] / "platforms" / "cpu"
SOURCE = 'extern "C" __attribute__((visibility("default"))) int add(int a, int b) { return a + b; }\n'
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler (c++) on this machine")


@pytest.fixture(scope="module")
def hook() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("fairlead_cpu_hatch_build", CPU / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("FAIRLEAD_CPU_SKIP_KERNELS", raising=False)


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "add.cpp").write_text(SOURCE, encoding="utf-8")
    return folder


@needs_compiler
def test_sources_become_one_library_per_instruction_set(hook: types.ModuleType, csrc: Path, tmp_path: Path) -> None:
    libraries = hook.compile_kernels(csrc, tmp_path / "lib", "unheard-of")
    assert [library.name for library in libraries] == ["libfairlead_cpu_generic.so"]
    assert ctypes.CDLL(str(libraries[0])).add(2, 3) == 5

    if platform.machine() == "x86_64":
        libraries = hook.compile_kernels(csrc, tmp_path / "lib")
        names = [library.name for library in libraries]
        assert {f"libfairlead_cpu_{isa}.so" for isa in ("generic", "avx2", "avx512")} <= set(names)
        assert sorted((tmp_path / "lib").iterdir()) == libraries


@needs_compiler
def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out_and_named(
    hook: types.ModuleType,
    csrc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libfairlead_cpu_old.so").touch()
    monkeypatch.setattr(hook, "ISA_FLAGS", {"made-up": {"generic": (), "future": ("-mno-such-instructions",)}})
    libraries = hook.compile_kernels(csrc, tmp_path / "lib", "made-up")
    assert [library.name for library in libraries] == ["libfairlead_cpu_generic.so"]
    assert list((tmp_path / "lib").iterdir()) == libraries  # the one of before is gone
    assert "-mno-such-instructions: no future kernels" in capsys.readouterr().err


def test_without_sources_nothing_happens(
    hook: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert hook.compile_kernels(tmp_path / "csrc", tmp_path / "lib") == []
    assert not (tmp_path / "lib").exists()


def test_without_a_compiler_the_error_says_what_to_do(
    hook: types.ModuleType, csrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(hook.KernelBuildError, match=r"CXX=no-such-compiler.*apt install g\+\+.*SKIP_KERNELS=1"):
        hook.compile_kernels(csrc, tmp_path / "lib")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(hook.KernelBuildError, match=r"looked for c\+\+, g\+\+, clang\+\+"):
        hook.compile_kernels(csrc, tmp_path / "lib")


def test_kernels_can_be_left_out_but_not_silently(
    hook: types.ModuleType,
    csrc: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FAIRLEAD_CPU_SKIP_KERNELS", "1")
    assert hook.compile_kernels(csrc, tmp_path / "lib") == []
    assert "without its native kernels" in capsys.readouterr().err


@needs_compiler
def test_a_compile_error_is_shown_and_leaves_nothing(hook: types.ModuleType, csrc: Path, tmp_path: Path) -> None:
    (csrc / "broken.cpp").write_text("int x = undeclared_name;\n", encoding="utf-8")
    with pytest.raises(hook.KernelBuildError, match="undeclared_name"):
        hook.compile_kernels(csrc, tmp_path / "lib")
    assert not (tmp_path / "lib").exists()


def wheel_of(root: Path) -> Path:
    (name,) = WheelBuilder(str(root)).build(directory=str(root / "dist"), versions=["standard"])
    return Path(name)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of platforms/cpu without its sources."""
    root = tmp_path / "cpu"
    root.mkdir()
    for name in ("pyproject.toml", "hatch_build.py"):
        shutil.copy(CPU / name, root)
    shutil.copytree(CPU / "fairlead_cpu", root / "fairlead_cpu", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return root


@needs_compiler
def test_the_wheel_carries_the_libraries_and_serves_every_python(project: Path) -> None:
    (project / "csrc").mkdir()
    (project / "csrc" / "add.cpp").write_text(SOURCE, encoding="utf-8")
    (project / ".gitignore").write_text("*.so\nlib/\n", encoding="utf-8")
    wheel = wheel_of(project)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    built = sorted(path.name for path in (project / "fairlead_cpu" / "lib").iterdir())
    assert built
    assert [name for name in built if f"fairlead_cpu/lib/{name}" not in names] == []


def test_the_wheel_is_pure_without_sources(project: Path) -> None:
    assert wheel_of(project).name.endswith("-py3-none-any.whl")
