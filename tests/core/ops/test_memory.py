"""Pools of memory: taken away, given back, counted. On the reference and on the CPU's own, which keeps files."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fairlead.interface import MemoryAllocator
from fairlead.ops.memory import PooledAllocator
from fairlead_cpu.allocator import HostAllocator


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@pytest.fixture(params=["pooled", "host"])
def allocator(request: pytest.FixtureRequest) -> MemoryAllocator:
    return PooledAllocator(allocate) if request.param == "pooled" else HostAllocator()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_was_offloaded_comes_back_in_the_same_tensors(allocator: MemoryAllocator, dtype: torch.dtype) -> None:
    first, second = allocator.empty((3, 5), dtype, tag="weights"), allocator.empty((7,), dtype, tag="weights")
    first.copy_(torch.arange(15).view(3, 5))
    second.fill_(3)
    view, parameter = first[1:].t(), torch.nn.Parameter(second, requires_grad=False)
    num_bytes = 22 * dtype.itemsize
    assert allocator.allocated_bytes("weights") == num_bytes
    with torch.inference_mode():
        allocator.offload("weights")
    assert allocator.allocated_bytes("weights") == 0
    assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 0
    allocator.restore("weights")
    assert allocator.allocated_bytes("weights") == num_bytes
    assert torch.equal(first, torch.arange(15).view(3, 5).to(dtype))
    assert torch.equal(view, first[1:].t())
    assert torch.equal(parameter, torch.full((7,), 3, dtype=dtype))
    view[0, 0] = 9
    assert first[1, 0] == 9  # still one memory


def test_what_was_discarded_comes_back_empty(allocator: MemoryAllocator) -> None:
    cache = allocator.empty((4, 4), torch.float32, tag="kv_cache")
    allocator.discard("kv_cache")
    assert allocator.allocated_bytes("kv_cache") == 0
    allocator.restore("kv_cache")
    assert cache.zero_().sum() == 0
    assert allocator.allocated_bytes("kv_cache") == 64


def test_pools_are_apart(allocator: MemoryAllocator) -> None:
    weight, cache = (allocator.empty((8,), torch.float32, tag=tag).fill_(1.0) for tag in ("weights", "kv_cache"))
    allocator.discard("kv_cache")
    assert (allocator.allocated_bytes("weights"), allocator.allocated_bytes("kv_cache")) == (32, 0)
    assert weight.sum() == 8
    assert cache.untyped_storage().nbytes() == 0


def test_memory_that_nobody_holds_is_not_counted_nor_restored(allocator: MemoryAllocator) -> None:
    kept, dropped = (allocator.empty((8,), torch.float32, tag="weights") for _ in range(2))
    view = kept[:2]
    del kept
    gc.collect()
    assert allocator.allocated_bytes("weights") == 64  # the view holds all of it
    allocator.offload("weights")
    del dropped
    gc.collect()
    allocator.restore("weights")
    assert allocator.allocated_bytes("weights") == 32
    assert view.shape == (2,)


@pytest.mark.parametrize("call", ["offload", "discard"])
def test_a_pool_that_is_away_can_only_be_restored(allocator: MemoryAllocator, call: str) -> None:
    tensor = allocator.empty((8,), torch.float32, tag="weights")
    calls: list[Callable[[], Any]] = [
        lambda: allocator.offload("weights"),
        lambda: allocator.discard("weights"),
        lambda: allocator.empty((1,), torch.float32, tag="weights"),
    ]
    getattr(allocator, call)("weights")
    for wrong in calls:
        with pytest.raises(ValueError, match="the pool 'weights' is away; restore it first"):
            wrong()
    allocator.restore("weights")
    allocator.restore("weights")  # does nothing
    assert tensor.untyped_storage().nbytes() == 32


@pytest.mark.parametrize("call", ["offload", "discard"])
def test_memory_that_numpy_holds_stays(allocator: MemoryAllocator, call: str) -> None:
    tensors = [allocator.empty((8,), torch.float32, tag="weights").fill_(1.0) for _ in range(3)]
    array = tensors[1].numpy()
    with pytest.raises(RuntimeError, match="1 tensors of the pool 'weights' cannot give their memory away"):
        getattr(allocator, call)("weights")
    assert allocator.allocated_bytes("weights") == 96
    assert array.sum() == sum(tensor.sum() for tensor in tensors) / 3


def test_there_are_two_pools(allocator: MemoryAllocator) -> None:
    with pytest.raises(ValueError, match="there is no pool 'scratch'; the pools are: weights, kv_cache"):
        allocator.empty((1,), torch.float32, tag="scratch")
    allocator.restore("kv_cache")


def test_no_room_is_a_memory_error(allocator: MemoryAllocator) -> None:
    with pytest.raises(MemoryError, match=r"cannot allocate \(1125899906842624,\) of torch.float32 for weights"):
        allocator.empty((2**50,), torch.float32, tag="weights")


def test_contents_that_find_no_place_leave_the_pool_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(PooledAllocator):
        def _keep(self, contents: torch.Tensor) -> Callable[[torch.Tensor], None]:
            raise OSError("no space left on device")

    allocator = Full(allocate)
    tensor = allocator.empty((8,), torch.float32, tag="weights").fill_(2.0)
    with pytest.raises(OSError, match="no space left"):
        allocator.offload("weights")
    assert tensor.sum() == 16
    assert allocator.allocated_bytes("weights") == 32
