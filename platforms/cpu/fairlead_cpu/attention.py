"""Paged attention on torch's fused scaled-dot-product kernel.

The fused kernel takes rectangles, a batch is ragged. So a step's sequences are sorted into groups of like query and
context length (a ratio of at least 3/4 for what one call pads), and each group is one gather and one kernel call per
layer: the loop is over a handful of groups, not over sequences, and at most a third more than the live context is
gathered. A whole prompt on its own needs no gather at all: it attends to the keys that it brings.

Shapes: T packed tokens, S sequences of a group, Q queries, L context tokens, H query heads, K kv-heads, G = H / K,
D head size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fairlead.interface import AttentionMetadata, AttentionShape, KVCache, MemoryAllocator
from fairlead.ops.attention import SlotCache, SlotCacheOwner

_MIN_FILL = 0.75  # a group's shortest sequence over its longest
_MAX_GROUP_SCORES = 2**24  # S * Q * L of a group, so that masks stay small


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Sequences that share one kernel call.

    `queries_SQ` are rows of the packed batch (padding repeats a sequence's last row), `slots_SL` the cache slots of
    the contexts (padding repeats the last token's slot: only slots that were written are ever read). The mask is
    additive. `rows` and `sources` say where the valid results go: out[rows] = result[sources].
    """

    num_seqs: int
    num_queries: int
    queries: torch.Tensor | None  # None: the group is the whole batch in order
    slots: torch.Tensor | None  # None: a whole prompt, which attends to the keys it brings
    first_row: int
    mask: torch.Tensor | None
    rows: torch.Tensor
    sources: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    slot_mapping_T: torch.Tensor
    groups: tuple[_Group, ...]


class SdpaAttention(SlotCacheOwner):
    """AttentionBackend of the CPU: grouped gathers and torch's fused attention."""

    name = "sdpa"

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator) -> None:
        super().__init__(shape, allocator)
        self._offsets = np.arange(shape.block_size, dtype=np.int64)

    def plan(self, metadata: AttentionMetadata) -> object:
        """Sorts the step's sequences into groups and builds their indices and masks."""
        query_lens, seq_lens = metadata.query_lens_S.astype(np.int64), metadata.seq_lens_S.astype(np.int64)
        first_rows = np.cumsum(query_lens) - query_lens
        groups = tuple(
            self._group(members, query_lens, seq_lens, first_rows, metadata.block_tables_SB)
            for members in _partition(query_lens, seq_lens)
        )
        return _Plan(slot_mapping_T=torch.from_numpy(metadata.slot_mapping_T.astype(np.int64)), groups=groups)

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, kv_cache: KVCache, plan: object
    ) -> torch.Tensor:
        """Writes all keys and values, then attends group by group."""
        assert isinstance(plan, _Plan)
        assert isinstance(kv_cache, SlotCache)
        kv_cache.k.index_copy_(0, plan.slot_mapping_T, k_TKD)
        kv_cache.v.index_copy_(0, plan.slot_mapping_T, v_TKD)
        out_THD = torch.empty_like(q_THD)
        for group in plan.groups:
            if group.slots is None:
                stop = group.first_row + group.num_queries
                rows = slice(group.first_row, stop)
                out_THD[rows] = self._whole_prompt(q_THD[rows], k_TKD[rows], v_TKD[rows])
            else:
                attend = self._decode if group.num_queries == 1 else self._chunk
                result = attend(q_THD, kv_cache, group)
                out_THD.index_copy_(0, group.rows, result if len(group.rows) == len(result) else result[group.sources])
        return out_THD

    def _whole_prompt(self, q_QHD: torch.Tensor, k_QKD: torch.Tensor, v_QKD: torch.Tensor) -> torch.Tensor:
        repeat = self.shape.num_heads // self.shape.num_kv_heads
        q_1HQD, k_1HQD, v_1HQD = (
            x.repeat_interleave(n, dim=1).transpose(0, 1)[None]
            for x, n in ((q_QHD, 1), (k_QKD, repeat), (v_QKD, repeat))
        )
        out_1HQD = functional.scaled_dot_product_attention(
            q_1HQD, k_1HQD, v_1HQD, is_causal=True, scale=self.shape.scale
        )
        return out_1HQD[0].transpose(0, 1)

    def _decode(self, q_THD: torch.Tensor, cache: SlotCache, group: _Group) -> torch.Tensor:
        """One query per sequence: the G heads of a kv-head are its G queries, so no key is read or copied twice."""
        K, D = self.shape.num_kv_heads, self.shape.head_size
        q_SHD = q_THD if group.queries is None else q_THD[group.queries]
        q_SKGD = q_SHD.view(group.num_seqs, K, -1, D)
        k_SKLD, v_SKLD = self._gather(cache, group)
        out_SKGD = functional.scaled_dot_product_attention(
            q_SKGD, k_SKLD, v_SKLD, attn_mask=group.mask, scale=self.shape.scale
        )
        return out_SKGD.reshape(-1, self.shape.num_heads, D)

    def _chunk(self, q_THD: torch.Tensor, cache: SlotCache, group: _Group) -> torch.Tensor:
        """Several queries per sequence, on top of a context."""
        H, K, D = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_size
        q_SQHD = (q_THD if group.queries is None else q_THD[group.queries]).view(
            group.num_seqs, group.num_queries, H, D
        )
        k_SHLD, v_SHLD = (x.repeat_interleave(H // K, dim=1) for x in self._gather(cache, group))
        out_SHQD = functional.scaled_dot_product_attention(
            q_SQHD.transpose(1, 2), k_SHLD, v_SHLD, attn_mask=group.mask, scale=self.shape.scale
        )
        return out_SHQD.transpose(1, 2).reshape(-1, H, D)

    def _gather(self, cache: SlotCache, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
        """The group's keys and values, (S, K, L, D)."""
        assert group.slots is not None
        size = (group.num_seqs, -1, self.shape.num_kv_heads, self.shape.head_size)
        k, v = (x.index_select(0, group.slots).view(size).transpose(1, 2) for x in (cache.k, cache.v))
        return k, v

    def _group(
        self,
        members: np.ndarray,
        query_lens: np.ndarray,
        seq_lens: np.ndarray,
        first_rows: np.ndarray,
        block_tables: np.ndarray,
    ) -> _Group:
        num_queries, num_tokens = int(query_lens[members].max()), int(seq_lens[members].max())
        lens_S1, context_S1 = query_lens[members, None], seq_lens[members, None]
        query_Q, token_L = np.arange(num_queries), np.arange(num_tokens)
        queries_SQ = first_rows[members, None] + np.minimum(query_Q, lens_S1 - 1)
        is_query_SQ = query_Q < lens_S1
        rows = torch.from_numpy(queries_SQ[is_query_SQ])
        sources = torch.from_numpy(np.flatnonzero(is_query_SQ))
        is_whole_batch = (
            len(members) == len(query_lens) and bool(is_query_SQ.all()) and bool((np.diff(members) > 0).all())
        )
        if len(members) == 1 and num_queries == num_tokens and num_queries > 1:
            slots = mask = None
        else:
            token_SL = np.minimum(token_L, context_S1 - 1)
            blocks_SL = np.take_along_axis(block_tables[members], token_SL // self.shape.block_size, axis=1)
            slots_SL = blocks_SL.astype(np.int64) * self.shape.block_size + token_SL % self.shape.block_size
            slots = torch.from_numpy(slots_SL.ravel())
            mask = self._mask(num_queries, num_tokens, lens_S1, context_S1)
        return _Group(
            num_seqs=len(members),
            num_queries=num_queries,
            queries=None if is_whole_batch else torch.from_numpy(queries_SQ.ravel()),
            slots=slots,
            first_row=int(first_rows[members[0]]),
            mask=mask,
            rows=rows,
            sources=sources,
        )

    def _mask(
        self, num_queries: int, num_tokens: int, lens_S1: np.ndarray, context_S1: np.ndarray
    ) -> torch.Tensor | None:
        """Additive (S, 1, Q, L) mask: a query sees its own position and those before it; None if all see all."""
        position_SQ = context_S1 - lens_S1 + np.minimum(np.arange(num_queries), lens_S1 - 1)
        hidden_SQL = np.arange(num_tokens) > position_SQ[:, :, None]
        if not hidden_SQL.any():
            return None
        zeros = torch.zeros(hidden_SQL.shape, dtype=self._dtype)
        return zeros.masked_fill_(torch.from_numpy(hidden_SQL), -torch.inf).unsqueeze(1)


def _partition(query_lens: np.ndarray, seq_lens: np.ndarray) -> list[np.ndarray]:
    """Splits the sequences into groups of like query and context length, decodes apart from chunks."""
    is_alone = (query_lens == seq_lens) & (query_lens > 1)
    groups: list[list[int]] = [[int(i)] for i in np.flatnonzero(is_alone)]
    rest = np.flatnonzero(~is_alone)
    order = rest[np.lexsort((rest, -seq_lens[rest], -query_lens[rest]))]
    members: list[int] = []
    num_queries = shortest = longest = 0
    for i in order.tolist():
        queries, context = int(query_lens[i]), int(seq_lens[i])
        low, high = min(shortest, context), max(longest, context)
        fits = (
            (queries == 1) == (num_queries == 1)
            and queries >= _MIN_FILL * num_queries
            and low >= _MIN_FILL * high
            and (len(members) + 1) * num_queries * high <= _MAX_GROUP_SCORES
        )
        if members and fits:
            members.append(i)
            shortest, longest = low, high
        else:
            members = [i]
            groups.append(members)
            num_queries, shortest, longest = queries, context, context
    return [np.sort(np.array(g)) for g in groups]
