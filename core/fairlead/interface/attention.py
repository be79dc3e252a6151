"""Attention over a paged cache: capabilities, a plan once a step, a call per layer.

Shapes: T packed tokens of a step, S sequences, H query heads, K kv-heads, D head size, B blocks of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """The kind of attention of one layer.

    `scale` multiplies the scores. A query sees itself and the `sliding_window - 1` tokens before it, or all of them.
    `soft_cap` c turns a score s into c * tanh(s / c). `alibi_slopes` (one per query head) add slope * (key position -
    query position) to the scores. With `value_size` the values are the first so many entries of the keys, and nothing
    else is stored (multi-head latent attention): K is 1, and `forward` gets None for v.
    Sources: Beltagy et al., "Longformer" (2020), section 3.1; Gemma 2 (2024), section 2; Press et al., "Train Short,
    Test Long" (2021), section 3; DeepSeek-V2 (2024), section 2.1.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    alibi_slopes: tuple[float, ...] | None = None
    value_size: int | None = None

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0
        assert self.sliding_window is None or self.sliding_window > 0
        assert self.alibi_slopes is None or len(self.alibi_slopes) == self.num_heads
        assert self.value_size is None or (self.num_kv_heads == 1 and self.value_size <= self.head_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What the core asks a backend for: a group of layers of one kind. `block_size` is in tokens.

    `dtype` is that of queries and results; `kv_dtype` is that of the cache, a torch name or "auto" for `dtype`.
    """

    spec: AttentionSpec
    num_layers: int
    block_size: int
    dtype: str
    kv_dtype: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """One step, as integers on the host (int32 NumPy arrays; the backend copies what its device needs).

    Sequence i has `query_lens_S[i]` new tokens, packed in order of i, at the end of a context of `seq_lens_S[i]`
    tokens (new ones included). Row i of `block_tables_SB` names its blocks; entries past its length, and those of
    blocks that have left the sliding window, are 0 and must not be read.
    Token t is stored in slot `slot_mapping_T[t]` = block id * block size + offset.
    """

    query_lens_S: "np.ndarray"
    seq_lens_S: "np.ndarray"
    block_tables_SB: "np.ndarray"
    slot_mapping_T: "np.ndarray"


KVCache = object
"""One layer's cache: whatever the backend's `allocate` returned. The core never looks inside."""

HostCache = object
"""What holds one layer's blocks in host memory: whatever the backend's `allocate_host` returned."""


class AttentionBackend(Protocol):
    """Paged attention of one group of layers. The backend owns the KV layout; the core sees block ids.

    A model whose layers differ (full and sliding-window attention, say) has a backend per kind, each with its own
    blocks, block tables and plan.
    """

    name: str

    def block_bytes(self) -> int:
        """Bytes that one block takes over all layers of the group."""
        ...

    def allocate(self, num_blocks: int) -> list[KVCache]:
        """Allocates the cache of `num_blocks` blocks; one entry per layer. The caller keeps them alive."""
        ...

    def plan(self, metadata: AttentionMetadata) -> object:
        """Prepares one step; called once before its layers run. The plan is opaque to the core."""
        ...

    def forward(
        self,
        q_THD: "torch.Tensor",
        k_TKD: "torch.Tensor",
        v_TKD: "torch.Tensor | None",
        kv_cache: KVCache,
        plan: object,
    ) -> "torch.Tensor":
        """Writes k and v of all T tokens to the cache, then attends causally; returns a new (T, H, D) tensor
        (with `value_size` V: (T, H, V)).

        All writes of a step come before its reads: a sequence may attend to a block that another one fills in the
        same step. Inputs are not changed. Tolerance against the reference: see `fairlead.ops.table`.
        """
        ...

    def copy_blocks(self, kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]) -> None:
        """Copies block contents source -> destination in every layer, in the order given, before the step's writes."""
        ...

    # Called only on a platform that has swap memory (`Platform.max_swap_bytes`). The copies belong to the device's own
    # order of work: a copy to the host holds what all earlier steps and copies wrote, later ones see what it brought,
    # and none has to be over when the call returns.

    def allocate_host(self, num_blocks: int) -> list[HostCache]:
        """Allocates `num_blocks` blocks in host memory, pinned where that makes copies faster; one entry per layer.

        The caller keeps them alive. A block takes `block_bytes` there, too.
        """
        ...

    def copy_to_host(
        self, kv_caches: Sequence[KVCache], host_caches: Sequence[HostCache], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Copies blocks of the device -> blocks of the host in every layer, in the order given."""
        ...

    def copy_from_host(
        self, host_caches: Sequence[HostCache], kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Copies blocks of the host -> blocks of the device in every layer, in the order given."""
        ...


@runtime_checkable
class RotaryAttention(Protocol):
    """What an AttentionBackend may do beside: rotate queries and keys in the pass that writes the cache.

    The engine looks for it once, when the model is built, and only where nobody asked for a provider of
    `rotary_embedding` by name: each layer then calls `forward_rotary` in place of that op and `forward`.
    """

    def forward_rotary(
        self,
        q_THD: "torch.Tensor",
        k_TKD: "torch.Tensor",
        v_TKD: "torch.Tensor",
        positions_T: "torch.Tensor",
        cos_PR: "torch.Tensor",
        sin_PR: "torch.Tensor",
        interleaved: bool,
        kv_cache: KVCache,
        plan: object,
    ) -> "torch.Tensor":
        """What `forward` gives for the first R dimensions of q and k rotated by the int64 positions, as the reference
        `rotary_embedding` does with these tables; the other dimensions stay. Inputs are not changed.
        """
        ...
