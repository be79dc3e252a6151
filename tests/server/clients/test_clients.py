"""Clients as they are, against `fairlead serve demo`: the dev environment's own in every run, in the full run each in
an environment of its own, installed from the package index that pip is set up for."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
PACKAGES = {
    "openai_client.py": ["openai"],
    "langchain_openai_client.py": ["langchain-openai"],
    "litellm_client.py": ["litellm"],
    "langchain_vllm.py": ["langchain-community"],
}


@pytest.fixture(scope="module")
def url(module_server: Any) -> str:
    return str(module_server.wait_for_url(120))


def run(command: list[str], *, keep_path: bool) -> None:
    variables = {name: value for name, value in os.environ.items() if keep_path or name != "PYTHONPATH"}
    variables["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the internet for prices first
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("ok"), done.stdout + done.stderr


def test_the_openai_client_of_the_dev_environment(url: str) -> None:
    assert importlib.metadata.version("openai")
    run([sys.executable, str(SCRIPTS / "openai_client.py"), url], keep_path=True)


def test_the_lines_of_the_guides(url: str) -> None:
    done = subprocess.run(["bash", str(SCRIPTS / "guides.sh"), url], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["ok"]), done.stdout + done.stderr


@pytest.mark.parametrize("script", PACKAGES)
def test_a_client_of_its_own_environment(script: str, environment: Callable[..., Path], request: Any) -> None:
    is_local = script == "langchain_vllm.py"
    python = environment(PACKAGES[script], with_ours=is_local)
    arguments = [] if is_local else [request.getfixturevalue("url")]
    run([str(python), str(SCRIPTS / script), *arguments], keep_path=is_local)
