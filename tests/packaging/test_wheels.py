"""`make wheels`: what it builds is installed without an index, and runs a model without what only the server needs."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECTS = [ROOT / "pyproject.toml", *sorted((ROOT / "platforms").glob("*/pyproject.toml"))]

SERVER_ALONE = ("fastapi", "starlette", "pydantic", "uvicorn", "httptools", "prometheus_client", "zmq", "openai")
FEATURES_ALONE = ("msgspec", "llguidance", "xgrammar", "rich", "matplotlib", "hatchling")
"""What a machine may lack that has torch and transformers (which bring typer, tqdm, PyYAML, Jinja2 and NumPy)."""

BLOCKED = """
import sys

class Without:
    '''A finder that does not find some packages, as if they were not installed.'''
    def __init__(self, finder):
        self._finder = finder
    def __getattr__(self, name):
        return getattr(self._finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {blocked!r} else self._finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make wheels` fills, from a copy of the tree; the native kernels are left out, to be quick."""
    tree = tmp_path_factory.mktemp("tree")
    leave_out = shutil.ignore_patterns("lib", "__pycache__", "*.egg-info")
    for name in ("core", "server", "platforms"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "venv" / "bin").mkdir(parents=True)
    (tree / "venv" / "bin" / "python").symlink_to(sys.executable)
    command = ["make", "--assume-old=venv/.dev-installed", "wheels", "VENV=venv", f"DIST={tree / 'dist'}"]
    # A link to an environment's interpreter is an interpreter without that environment's packages.
    paths = {"PYTHONPATH": sysconfig.get_path("purelib"), "FAIRLEAD_CPU_SKIP_KERNELS": "1"}
    done = subprocess.run(command, cwd=tree, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree / "dist"


@pytest.fixture(scope="module")
def python(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheels and this one's packages, but none of its editable ones."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = ["--python", str(python), "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *install, *map(str, wheels.glob("*.whl"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return python


def run(python: Path, code: str, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-c", BLOCKED.format(blocked=set(blocked)) + code]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_every_distribution_becomes_a_wheel(wheels: Path) -> None:
    projects = [tomllib.loads(path.read_text(encoding="utf-8"))["project"] for path in PROJECTS]
    expected = {f"{project['name'].replace('-', '_')}-{project['version']}" for project in projects}
    assert {"-".join(wheel.name.split("-")[:2]) for wheel in wheels.iterdir()} == expected


GENERATE = """
from fairlead import LLM, SamplingParams
import fairlead, fairlead_cpu
assert all(sys.prefix in module.__file__ for module in (fairlead, fairlead_cpu)), "not the wheels"
llm = LLM("demo", dtype="float32")
output = llm.generate("ROMEO:", SamplingParams(max_tokens=8, temperature=0), use_tqdm=False)[0]
print(output.outputs[0].token_ids)
"""


def test_the_offline_path_needs_nothing_of_the_server(python: Path) -> None:
    """The same tokens come with and without: records are dataclasses where msgspec is missing."""
    without = run(python, GENERATE, (*SERVER_ALONE, *FEATURES_ALONE, "typer"))
    assert without.returncode == 0, without.stderr
    complete = run(python, GENERATE, ())
    assert complete.returncode == 0, complete.stderr
    assert without.stdout == complete.stdout
    assert without.stdout.count(",") == 7


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "from fairlead import AsyncEngine",
            "AsyncEngine needs the package 'zmq', which is not installed; pip install pyzmq",
        ),
        (
            "from fairlead_server.entry import main; main(['serve', 'demo'])",
            "error: the command line needs the package 'msgspec', which is not installed; pip install msgspec",
        ),
        (
            "from fairlead import LLM, SamplingParams, StructuredOutputParams as S\n"
            "LLM('demo').generate('A', SamplingParams(structured_outputs=S(regex='a+')), use_tqdm=False)",
            "no grammar library is installed; pip install llguidance",
        ),
    ],
)
def test_a_feature_says_which_package_it_lacks(python: Path, code: str, message: str) -> None:
    done = run(python, code, (*SERVER_ALONE, *FEATURES_ALONE))
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split()), done.stderr
