"""Pools that leave the device and come back; what memory there is, and what work takes of it."""

import gc
from pathlib import Path

import pytest
import torch
from fake_device import GIB, FakeModule, fake_runtime

from fairlead.interface import TAGS
from fairlead_triton.device import memory
from fairlead_triton.device.allocator import DeviceAllocator


class Holder:
    def __init__(self) -> None:
        self.num_releases = 0

    def release(self) -> None:
        self.num_releases += 1


def make(module: FakeModule) -> DeviceAllocator:
    return DeviceAllocator(fake_runtime(module))


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("keeps", [True, False])
def test_a_pool_that_leaves_gives_the_device_its_memory(tag: str, keeps: bool) -> None:
    module = FakeModule()
    allocator = make(module)
    tensor = allocator.empty((1024, 1024), torch.float32, tag=tag)
    view = tensor[3:5]
    tensor.fill_(7)
    free = module.mem_get_info(0)[0]
    (allocator.offload if keeps else allocator.discard)(tag)
    assert module.mem_get_info(0)[0] == free + tensor.nbytes  # for everybody, not for this process alone
    assert (allocator.allocated_bytes(tag), tensor.shape) == (0, (1024, 1024))
    assert module.num_synchronized == 1  # what was queued read it still
    allocator.restore(tag)
    assert allocator.allocated_bytes(tag) == tensor.nbytes
    if keeps:
        assert bool((tensor == 7).all())
    tensor.fill_(9)
    assert bool((view == 9).all())


def test_contents_survive_a_device_that_a_neighbour_has_filled() -> None:
    module = FakeModule(total_bytes=GIB)
    allocator = make(module)
    tensor = allocator.empty((1024,), torch.float32, tag="weights")
    tensor.copy_(torch.arange(1024))
    allocator.offload("weights")
    with pytest.raises(ValueError, match="the pool 'weights' is away; restore it first"):
        allocator.empty((1,), torch.float32, tag="weights")
    other = allocator.empty((4,), torch.float32, tag="kv_cache")  # the other pool goes on
    assert other.shape == (4,)
    allocator.restore("weights")
    assert torch.equal(tensor, torch.arange(1024).float())


def test_what_the_device_has_not_is_a_memory_error() -> None:
    allocator = make(FakeModule(total_bytes=GIB, neighbour_bytes=GIB // 2))
    with pytest.raises(MemoryError, match=r"cannot allocate \(805306368,\) of torch.uint8 for kv_cache: out of memory"):
        allocator.empty((3 * GIB // 4,), torch.uint8, tag="kv_cache")
    with pytest.raises(ValueError, match="there is no pool 'cache'; the pools are: weights, kv_cache"):
        allocator.empty((1,), torch.uint8, tag="cache")


def test_holders_of_addresses_hear_of_it_and_are_not_kept() -> None:
    allocator = make(FakeModule())
    tensor = allocator.empty((4,), torch.float32, tag="weights")
    holder, generation = Holder(), allocator.generation
    allocator.add_holder(holder)
    allocator.discard("weights")
    assert (holder.num_releases, allocator.generation) == (1, generation)
    allocator.restore("weights")
    assert allocator.generation > generation
    assert tensor.nbytes == 16
    del holder
    gc.collect()
    allocator.discard("weights")  # nobody is left to be told


def test_free_memory_counts_what_torch_holds_unused() -> None:
    module = FakeModule(total_bytes=16 * GIB, neighbour_bytes=2 * GIB)
    runtime = fake_runtime(module)
    assert memory.info(runtime).free_bytes == 14 * GIB
    tensor = module.empty((GIB // 4,), torch.uint8)
    assert memory.info(runtime).free_bytes == 14 * GIB - tensor.nbytes
    del tensor
    assert module.memory_reserved(0) == GIB // 4
    info = memory.info(runtime)
    assert (info.free_bytes, info.total_bytes) == (14 * GIB, 16 * GIB)


def test_a_driver_without_the_query_leaves_our_own_account() -> None:
    module = FakeModule(total_bytes=16 * GIB, neighbour_bytes=2 * GIB, has_memory_query=False)
    tensor = module.empty((GIB // 4,), torch.uint8)
    info = memory.info(fake_runtime(module))
    assert (info.free_bytes, info.total_bytes) == (16 * GIB - tensor.nbytes, 16 * GIB)


@pytest.mark.parametrize("neighbour", [-GIB, 3 * GIB])
def test_a_profile_is_of_this_process_alone(neighbour: int) -> None:
    module = FakeModule(neighbour_bytes=2 * GIB)
    before, kept = module.empty((5000,), torch.uint8), []

    def work() -> None:
        large = module.empty((300_000,), torch.uint8)
        kept.append(module.empty((1000,), torch.uint8))
        module.neighbour_bytes += neighbour
        del large

    found = memory.profile(fake_runtime(module), work)
    assert (found.peak_bytes, found.kept_bytes) == (301_000, 1000)
    assert before.nbytes == 5000


def test_work_that_frees_what_was_there_takes_nothing() -> None:
    module = FakeModule()
    held = [module.empty((5000,), torch.uint8)]
    found = memory.profile(fake_runtime(module), held.clear)
    assert (found.peak_bytes, found.kept_bytes) == (0, 0)


def test_what_the_work_raises_goes_on() -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        memory.profile(fake_runtime(), fail)


def test_host_memory_is_what_the_system_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert memory.host_bytes(meminfo) == 0
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:   77 kB\n")
    assert memory.host_bytes(meminfo) == 77 * 1024
