"""The records that a platform hands to the core: frozen data, no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairlead.interface.platform import Platform

PLATFORM_API = "1.0"
"""Version of this interface. From 1.1 on, the core also takes plugins of the version before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device that a probe found: `name` selects it (`--device`), `description` is for people."""

    name: str
    description: str
    memory_bytes: int

    def __post_init__(self) -> None:
        if not self.name or self.memory_bytes <= 0:
            raise ValueError(f"a device needs a name and a memory size above 0, got {self!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformSpec:
    """What a plugin registers: cheap to make, importing neither torch nor a driver.

    `probe()` returns the usable devices, best first, or one sentence that says why there are none.
    `create(device)` may import the world; it returns the Platform of that device.
    Of the available platforms the one of the highest `priority` is taken; the CPU has 0.
    `environment` are variables that an engine's process starts with, where the user has not set them: for libraries
    that read theirs when they are loaded, before `create` could say anything. (An LLM in the user's own process is
    left as it is.)
    `niceness` is by how much an engine's process gives way to others, its front end above all: for devices that
    compute on the processors that answer clients, too. 0 to 19, as of nice(2).
    `diagnose()` returns a sentence for each thing that is wrong with the driver, or with the torch that is installed
    for it; `fairlead doctor` alone calls it, whether `probe` found devices or not. It may take its time.
    """

    name: str
    api_version: str
    priority: int
    probe: Callable[[], tuple[Device, ...] | str]
    create: Callable[[Device], "Platform"]
    environment: Mapping[str, str] = field(default_factory=dict)
    niceness: int = 0
    diagnose: Callable[[], tuple[str, ...]] = tuple


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a platform can do; negotiated before anything is allocated. A lie here is a breach of the contract.

    dtypes are torch names without the prefix ("float32"). The first of `block_sizes` (tokens) is the preferred one.
    Empty `head_sizes` means any. `kv_layouts` names the ways in which its backends lay the cache out, for caches that
    travel between engines. `kv_dtypes` are those of the cache by torch's names, "auto" being the model's; `fp8` as a
    user writes it means the first of 8 bits. `quantization` names the
    schemes that run on methods of its own (others run on their references). `graphs`: its graph runner replays
    captured steps. With `static_shapes`, steps of other sizes than its graph runner's buckets cannot run at all.
    `max_batched_tokens` and `max_num_seqs` bound one step; None is no bound, and a lower bound of sequences than was
    asked for is taken. `max_world_size` is how many devices can
    run one model; above 1 it has collectives. `batch_invariant`: a sequence's results do not depend on what shares
    its batch, bit by bit. `computes` is False for a simulated device, whose results have the right
    shape and dtype but no meaning (`fairlead.testing.null`).
    """

    dtypes: tuple[str, ...]
    block_sizes: tuple[int, ...]
    head_sizes: tuple[int, ...] = ()
    kv_layouts: tuple[str, ...] = ("slots",)
    kv_dtypes: tuple[str, ...] = ("auto",)
    quantization: tuple[str, ...] = ()
    graphs: bool = False
    static_shapes: bool = False
    batch_invariant: bool = False
    max_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_world_size: int = 1
    computes: bool = True

    def __post_init__(self) -> None:
        for name in ("dtypes", "block_sizes", "kv_layouts", "kv_dtypes"):
            if not getattr(self, name):
                raise ValueError(f"Capabilities.{name} must not be empty")
        limits = (self.max_batched_tokens, self.max_num_seqs, self.max_world_size)
        if any(n <= 0 for n in (*self.block_sizes, *self.head_sizes, *(n for n in limits if n is not None))):
            raise ValueError(f"the sizes of Capabilities must be above 0, got {self!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Settings that suit a platform; the core applies them where the user gave none.

    `async_scheduling` pays where the device computes while the host's processors are free.
    """

    dtype: str
    block_size: int
    max_num_batched_tokens: int
    device_memory_utilization: float
    async_scheduling: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class OpProvider:
    """One implementation of one op.

    `fn` has the signature of the op's reference in `fairlead.ops.reference`. `refuses(dtype)` returns why this
    provider cannot serve that dtype (a name such as "bfloat16"), or None if it can. The highest priority that does
    not refuse is chosen, once, when the model is built; the reference has priority 0.
    """

    name: str
    fn: Callable[..., Any]
    priority: int = 10
    refuses: Callable[[str], str | None] = lambda dtype: None
