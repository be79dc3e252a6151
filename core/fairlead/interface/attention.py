"""Attention over a paged cache: capabilities, a plan once a step, a call per layer.

Shapes: T packed tokens of a step, S sequences, H query heads, K kv-heads, D head size, B blocks of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """What the core asks a backend for, once per engine. `block_size` is in tokens."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int
    scale: float
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """One step, as integers on the host (int32 NumPy arrays; the backend copies what its device needs).

    Sequence i has `query_lens_S[i]` new tokens, packed in order of i, at the end of a context of `seq_lens_S[i]`
    tokens (new ones included). Row i of `block_tables_SB` names its blocks; entries past its length are 0.
    Token t is stored in slot `slot_mapping_T[t]` = block id * block size + offset.
    """

    query_lens_S: "np.ndarray"
    seq_lens_S: "np.ndarray"
    block_tables_SB: "np.ndarray"
    slot_mapping_T: "np.ndarray"


KVCache = object
"""One layer's cache: whatever the backend's `allocate` returned. The core never looks inside."""


class AttentionBackend(Protocol):
    """Paged attention of one engine on one platform. The backend owns the KV layout; the core sees block ids."""

    name: str

    def block_bytes(self) -> int:
        """Bytes that one block takes over all layers."""
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
        v_TKD: "torch.Tensor",
        kv_cache: KVCache,
        plan: object,
    ) -> "torch.Tensor":
        """Writes k and v of all T tokens to the cache, then attends causally; returns a new (T, H, D) tensor.

        All writes of a step come before its reads: a sequence may attend to a block that another one fills in the
        same step. Inputs are not changed. Tolerance against the reference: see `fairlead.ops.table`.
        """
        ...

    def copy_blocks(self, kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]) -> None:
        """Copies block contents source -> destination in every layer, in the order given, before the step's writes."""
        ...
