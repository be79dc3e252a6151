"""Makes the plugins of this folder, and the null platform, as well known as installed ones."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENTRY_POINTS = {
    "acme-wrong": "wrong = wrong_plugins",
    "acme-eager": "eager = eager_plugin",
    "acme-null": "null = fairlead.testing.null",
}


@pytest.fixture(scope="session")
def plugins_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip makes it: modules, and the metadata of the distributions that brought them."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("wrong_plugins.py", "wrong_parts.py", "eager_plugin.py"):
        shutil.copy(HERE / name, folder)
    for distribution, entry_point in ENTRY_POINTS.items():
        metadata = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[fairlead.platforms]\n{entry_point}\n")
    return folder


@pytest.fixture(scope="module", autouse=True)
def _known_plugins(plugins_folder: Path) -> Iterator[None]:
    """In this process and in those that it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(plugins_folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(plugins_folder), os.environ.get("PYTHONPATH", "")]))
        yield
