"""Fixtures that all tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports torch, here and in the servers that tests start: the models are tiny, and threads of several
# processes that spin for each other on two cores cost ten times what they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Where there is no accelerator, Triton kernels run in its interpreter. It is asked for when triton is imported, which
# transformers does too, so that no later place would do. Nothing else here runs Triton kernels.
ACCELERATORS = ("nvidiactl", "kfd", "dri/renderD*")
if not any(found for pattern in ACCELERATORS for found in Path("/dev").glob(pattern)):
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = Path(__file__).parent
ALONE = ("test_async_engine.py", "test_end_to_end.py", "test_limits.py", "test_process.py", "test_streaming.py")
FULL = os.environ.get("FAIRLEAD_TEST_FULL") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that hold processes to a time run alone (`make test`)."""
    for item in items:
        if item.path.parent == HERE / "server" and item.path.name in ALONE:
            item.add_marker("alone")


@pytest.fixture(scope="session")
def full() -> bool:
    """Whether the full counts run (`make test-full`)."""
    return FULL


@pytest.fixture(scope="session")
def count() -> Callable[..., int]:
    """`count(100, full=10_000)`: how often something runs. A full test is the quick one with a larger number."""

    def choose(quick: int, *, full: int) -> int:
        return full if FULL else quick

    return choose


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder of data that is too large for the repository: FAIRLEAD_TEST_DATA, or shared/data beside the checkout."""
    asked = os.environ.get("FAIRLEAD_TEST_DATA")
    folder = Path(asked) if asked else Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test data: {folder} is missing; set FAIRLEAD_TEST_DATA")
    return folder
