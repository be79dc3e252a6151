"""Fixtures of the tests of Triton kernels: on an accelerator where there is one, else in Triton's interpreter.

tests/conftest.py has set TRITON_INTERPRET before anything could import triton, if the machine has no accelerator.
"""

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def _accelerator() -> torch.device | None:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.xpu.is_available():
        return torch.device("xpu")
    return None


@pytest.fixture(scope="session")
def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device(interpreted: bool) -> torch.device:
    """Where the tensors of kernels live."""
    found = _accelerator()
    if interpreted:
        return torch.device("cpu")
    if found is None:
        pytest.fail("this machine has an accelerator but torch cannot use it; set TRITON_INTERPRET=1 to interpret")
    return found


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtypes of models."""
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(autouse=True)
def _quiet_arithmetic() -> Iterator[None]:
    """Kernels that overflow or divide by zero go on, as on a device: the interpreter's NumPy would warn."""
    with np.errstate(all="ignore"):
        yield
