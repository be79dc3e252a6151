"""Paged attention on torch's fused scaled-dot-product kernel.

The fused kernel takes rectangles, a batch is ragged. So a step's sequences are sorted into groups of like query and
context length (a ratio of at least 3/4 for what one call pads), and each group is one gather and one kernel call per
layer: the loop is over a handful of groups, not over sequences, and at most a third more than the live context is
gathered. Of a sliding window only the window is. A long prompt on its own needs no gather at all: it attends to the
keys that it brings.

Shapes: T packed tokens, S sequences of a group, Q queries, L context tokens, H query heads, K kv-heads, G = H / K,
D head size, E head size of the values.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fairlead.interface import AttentionMetadata, AttentionShape, KVCache, MemoryAllocator
from fairlead.ops.attention import SlotCache, SlotCacheOwner

_MIN_FILL = 0.75  # a group's shortest sequence over its longest
_MAX_GROUP_SCORES = 2**24  # S * Q * L of a group, so that masks stay small
_ALONE_TOKENS = 256  # a whole prompt of so many tokens gets a call of its own; shorter ones are grouped like the rest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Sequences that share one kernel call.

    `queries` are rows of the packed batch (padding repeats a sequence's last row), `slots` the cache slots of the
    contexts (padding repeats the last token's slot: only slots that were written are ever read). The mask is
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lengths:
    """Per sequence: new queries, tokens in all, first token that a query can see, first row in the packed batch."""

    queries: np.ndarray
    tokens: np.ndarray
    low: np.ndarray
    rows: np.ndarray
    alone: np.ndarray


class SdpaAttention(SlotCacheOwner):
    """AttentionBackend of the CPU: grouped gathers and torch's fused attention."""

    name = "sdpa"

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator) -> None:
        super().__init__(shape, allocator)
        self._value_size = shape.spec.value_size or shape.spec.head_size
        self._slopes_H: torch.Tensor | None = None
        if shape.spec.alibi_slopes is not None:
            self._slopes_H = torch.tensor(shape.spec.alibi_slopes, dtype=torch.float32)

    def plan(self, metadata: AttentionMetadata) -> object:
        """Sorts the step's sequences into groups and builds their indices and masks."""
        lengths = self._lengths(metadata)
        groups = tuple(self._group(m, lengths, metadata.block_tables_SB) for m in _partition(lengths))
        return _Plan(slot_mapping_T=torch.from_numpy(metadata.slot_mapping_T.astype(np.int64)), groups=groups)

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_cache: KVCache, plan: object
    ) -> torch.Tensor:
        """Writes all keys and values, then attends group by group."""
        assert isinstance(plan, _Plan)
        assert isinstance(kv_cache, SlotCache)
        kv_cache.k.index_copy_(0, plan.slot_mapping_T, k_TKD)
        if v_TKD is None:
            v_TKD = k_TKD[:, :, : self._value_size]
        else:
            kv_cache.v.index_copy_(0, plan.slot_mapping_T, v_TKD)
        out_THE = q_THD.new_empty((q_THD.shape[0], q_THD.shape[1], self._value_size))
        for group in plan.groups:
            if group.slots is None:
                rows = slice(group.first_row, group.first_row + group.num_queries)
                out_THE[rows] = self._whole_prompt(q_THD[rows], k_TKD[rows], v_TKD[rows])
            else:
                attend = self._decode if group.num_queries == 1 else self._chunk
                result = attend(q_THD, kv_cache, group)
                out_THE.index_copy_(0, group.rows, result if len(group.rows) == len(result) else result[group.sources])
        return out_THE

    def _whole_prompt(self, q_QHD: torch.Tensor, k_QKD: torch.Tensor, v_QKE: torch.Tensor) -> torch.Tensor:
        repeat = self.spec.num_heads // self.spec.num_kv_heads
        q_1HQD, k_1HQD, v_1HQE = (
            x.repeat_interleave(n, dim=1).transpose(0, 1)[None]
            for x, n in ((q_QHD, 1), (k_QKD, repeat), (v_QKE, repeat))
        )
        out_1HQE = functional.scaled_dot_product_attention(
            q_1HQD, k_1HQD, v_1HQE, is_causal=True, scale=self.spec.scale
        )
        return out_1HQE[0].transpose(0, 1)

    def _decode(self, q_THD: torch.Tensor, cache: SlotCache, group: _Group) -> torch.Tensor:
        """One query per sequence: the G heads of a kv-head are its G queries, so no key is read or copied twice."""
        q_SHD = q_THD if group.queries is None else q_THD[group.queries]
        q_SKGD = q_SHD.view(group.num_seqs, self.spec.num_kv_heads, -1, self.spec.head_size)
        out_SKGE = self._attend(q_SKGD, *self._gather(cache, group), group.mask)
        return out_SKGE.reshape(-1, self.spec.num_heads, self._value_size)

    def _chunk(self, q_THD: torch.Tensor, cache: SlotCache, group: _Group) -> torch.Tensor:
        """Several queries per sequence, on top of a context."""
        H, K = self.spec.num_heads, self.spec.num_kv_heads
        q_XHD = q_THD if group.queries is None else q_THD[group.queries]
        q_SQHD = q_XHD.view(group.num_seqs, group.num_queries, H, self.spec.head_size)
        k_SHLD, v_SHLE = (x.repeat_interleave(H // K, dim=1) for x in self._gather(cache, group))
        out_SHQE = self._attend(q_SQHD.transpose(1, 2), k_SHLD, v_SHLE, group.mask)
        return out_SHQE.transpose(1, 2).reshape(-1, H, self._value_size)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The fused kernel, or, where scores are capped, which it cannot do, plain float32 arithmetic."""
        cap = self.spec.soft_cap
        if cap is None:
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.spec.scale)
        scores = cap * torch.tanh(q.float() @ k.float().transpose(-1, -2) * (self.spec.scale / cap))
        if mask is not None:
            scores = scores + mask
        return (scores.softmax(-1) @ v.float()).to(q.dtype)

    def _gather(self, cache: SlotCache, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
        """The group's keys (S, K, L, D) and values (S, K, L, E)."""
        assert group.slots is not None
        size = (group.num_seqs, -1, self.spec.num_kv_heads, self.spec.head_size)
        k = cache.k.index_select(0, group.slots).view(size).transpose(1, 2)
        if cache.v is cache.k:
            return k, k[..., : self._value_size]
        return k, cache.v.index_select(0, group.slots).view(size).transpose(1, 2)

    def _lengths(self, metadata: AttentionMetadata) -> _Lengths:
        queries, tokens = metadata.query_lens_S.astype(np.int64), metadata.seq_lens_S.astype(np.int64)
        window = self.spec.sliding_window
        low = np.zeros_like(tokens) if window is None else np.maximum(tokens - queries - window + 1, 0)
        alone = (queries == tokens) & (queries >= _ALONE_TOKENS)
        if self.spec.soft_cap is not None or self._slopes_H is not None:
            alone[:] = False
        elif window is not None:
            alone &= tokens <= window
        return _Lengths(queries=queries, tokens=tokens, low=low, rows=np.cumsum(queries) - queries, alone=alone)

    def _group(self, members: np.ndarray, lengths: _Lengths, block_tables: np.ndarray) -> _Group:
        queries_S1, low_S1, tokens_S1 = (x[members, None] for x in (lengths.queries, lengths.low, lengths.tokens))
        num_queries = int(queries_S1.max())
        query_Q = np.arange(num_queries)
        rows_SQ = lengths.rows[members, None] + np.minimum(query_Q, queries_S1 - 1)
        is_query_SQ = query_Q < queries_S1
        slots = mask = None
        if not lengths.alone[members[0]]:
            key_SL = low_S1 + np.arange(int((tokens_S1 - low_S1).max()))
            token_SL = np.minimum(key_SL, tokens_S1 - 1)
            blocks_SL = np.take_along_axis(block_tables[members], token_SL // self.shape.block_size, axis=1)
            slots_SL = blocks_SL.astype(np.int64) * self.shape.block_size + token_SL % self.shape.block_size
            slots = torch.from_numpy(slots_SL.ravel())
            mask = self._mask(tokens_S1 - queries_S1 + np.minimum(query_Q, queries_S1 - 1), key_SL)
        is_whole_batch = len(members) == len(lengths.queries) and bool(is_query_SQ.all())
        return _Group(
            num_seqs=len(members),
            num_queries=num_queries,
            queries=None if is_whole_batch else torch.from_numpy(rows_SQ.ravel()),
            slots=slots,
            first_row=int(lengths.rows[members[0]]),
            mask=mask,
            rows=torch.from_numpy(rows_SQ[is_query_SQ]),
            sources=torch.from_numpy(np.flatnonzero(is_query_SQ)),
        )

    def _mask(self, query_SQ: np.ndarray, key_SL: np.ndarray) -> torch.Tensor | None:
        """Additive mask over positions, (S, 1, Q, L) or with ALiBi (S, H, Q, L); None if every query sees every key.

        For a decode group (Q = 1) with ALiBi the shape is (S, K, G, L), as its queries are laid out.
        """
        distance_SQL = key_SL[:, None, :] - query_SQ[:, :, None]
        hidden_SQL = distance_SQL > 0
        if self.spec.sliding_window is not None:
            hidden_SQL |= distance_SQL <= -self.spec.sliding_window
        hidden = torch.from_numpy(hidden_SQL).unsqueeze(1)
        if self._slopes_H is not None:
            bias_SHQL = self._slopes_H[:, None, None] * torch.from_numpy(distance_SQL.astype(np.float32)).unsqueeze(1)
            mask = bias_SHQL.masked_fill_(hidden, -torch.inf).to(self._dtype)
            if query_SQ.shape[1] == 1:
                return mask.view(len(query_SQ), self.spec.num_kv_heads, -1, mask.shape[-1])
            return mask
        if not hidden_SQL.any():
            return None
        return torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)


def _partition(lengths: _Lengths) -> list[np.ndarray]:
    """Splits the sequences into groups of like query and context length, decodes apart from chunks."""
    groups: list[list[int]] = [[int(i)] for i in np.flatnonzero(lengths.alone)]
    context = lengths.tokens - lengths.low
    rest = np.flatnonzero(~lengths.alone)
    members: list[int] = []
    num_queries = shortest = longest = 0
    for i in rest[np.lexsort((rest, -context[rest], -lengths.queries[rest]))].tolist():
        queries, tokens = int(lengths.queries[i]), int(context[i])
        low, high = min(shortest, tokens), max(longest, tokens)
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
            num_queries, shortest, longest = queries, tokens, tokens
    return [np.sort(np.array(g)) for g in groups]
