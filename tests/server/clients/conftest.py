"""Environments that tests make for the programs of others."""

import site
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def environment(tmp_path: Path, full: bool) -> Callable[..., Path]:
    """Makes an environment with the packages; returns its Python. `with_ours` lets it see Fairlead, behind its own."""

    def make(packages: list[str], *, with_ours: bool) -> Path:
        if not full:
            pytest.skip("installs from the package index; make test-full runs it")
        venv.create(tmp_path / "env", with_pip=True)
        python = tmp_path / "env" / "bin" / "python"
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        done = subprocess.run(install, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, done.stderr
        if with_ours:
            version = f"python{sys.version_info.major}.{sys.version_info.minor}"
            folder = tmp_path / "env" / "lib" / version / "site-packages"
            # Not as plain lines: ours are editable installs, known by .pth files of their own.
            lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
            (folder / "behind.pth").write_text("".join(lines))
        return python

    return make
