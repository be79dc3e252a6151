"""Paged attention on torch's fused scaled-dot-product kernel.

The fused kernel takes rectangles, a batch is ragged. So a step's sequences are sorted into groups of like query and
context length, each of them one gather and one kernel call per layer. A group's context is at most about a second-level
cache, so that the kernel reads what the gather has just written: the calls go with the size of the context, not with
the number of sequences. Of a sliding window only the window is gathered. A longer prompt on its own needs no gather at
all: it attends to the keys that it brings.

Shapes: T packed tokens, S sequences of a group, P pieces of them, Q queries, L context tokens, H query heads,
K kv-heads, G = H / K, D head size, E head size of the values.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fairlead.interface import AttentionMetadata, AttentionShape, KVCache, MemoryAllocator
from fairlead.ops.attention import SlotCache, SlotCacheOwner

# 64 decodes on contexts of 64 to 290, 30 layers, one thread: 0.48 (9 heads, 3 kv-heads) and 0.46 (8, 8) of the time of
# groups without a limit of bytes. Around these two values, 0.5 to 0.9 and 0.5 to 4 MiB, all is within 0.1.
_MIN_FILL = 0.75  # a group's shortest sequence over its longest
_GROUP_BYTES = 2**20  # gathered keys and values of a group, per thread; one sequence may have more
_MAX_SCORES = 2**22  # S * Q * L of a group, so that masks stay small
_MIN_ALONE = 33  # tokens of the shortest prompt that is not put into a group: 64 of 5 to 30 tokens take 0.8 of the time


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Sequences that share one kernel call.

    `queries_SQ` are rows of the packed batch (padding repeats a sequence's last row), `slots_SL` the cache slots of
    the contexts (padding repeats the last token's slot: only slots that were written are ever read). The mask is
    additive. `rows` and `sources` say where the valid results go: out[rows] = result[sources], None for all.
    """

    num_seqs: int
    num_queries: int
    queries: torch.Tensor | None  # None: the group is the whole batch in order
    slots: torch.Tensor | None  # None: a whole prompt, which attends to the keys it brings
    first_row: int
    mask: torch.Tensor | None
    rows: torch.Tensor
    sources: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    slot_mapping_T: torch.Tensor
    groups: tuple[_Group, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pieces:
    """What is grouped: runs of queries of a sequence, at `first_rows_P` of the batch, at the end of a context.

    Tokens before `lows_P` are out of every query's window. `alone_P` marks whole prompts that need no gather.
    """

    sequences_P: np.ndarray
    first_rows_P: np.ndarray
    query_lens_P: np.ndarray
    seq_lens_P: np.ndarray
    lows_P: np.ndarray
    alone_P: np.ndarray


class SdpaAttention(SlotCacheOwner):
    """AttentionBackend of the CPU: grouped gathers and torch's fused attention."""

    name = "sdpa"

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator) -> None:
        super().__init__(shape, allocator)
        self._value_size = self.spec.value_size or self.spec.head_size
        self._slopes_H: torch.Tensor | None = None
        self._mask_heads = 1  # a mask is the same for all heads, but with ALiBi
        if self.spec.alibi_slopes is not None:
            self._mask_heads = self.spec.num_heads
            self._slopes_H = torch.tensor(self.spec.alibi_slopes, dtype=torch.float32)
        token_bytes = self.block_bytes() // shape.num_layers // shape.block_size
        self._max_group_tokens = _GROUP_BYTES * torch.get_num_threads() // token_bytes

    def plan(self, metadata: AttentionMetadata) -> object:
        """Sorts the step's sequences into groups and builds their indices and masks."""
        pieces = self._cut(metadata.query_lens_S.astype(np.int64), metadata.seq_lens_S.astype(np.int64))
        groups = tuple(
            self._group(pieces, members, metadata.block_tables_SB)
            for members in _partition(pieces, self._max_group_tokens, _MAX_SCORES // self._mask_heads)
        )
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
        out_THE = q_THD.new_empty((*q_THD.shape[:2], self._value_size))
        for group in plan.groups:
            if group.slots is None:
                stop = group.first_row + group.num_queries
                rows = slice(group.first_row, stop)
                out_THE[rows] = self._whole_prompt(q_THD[rows], k_TKD[rows], v_TKD[rows])
            else:
                attend = self._decode if group.num_queries == 1 else self._chunk
                result = attend(q_THD, kv_cache, group)
                out_THE.index_copy_(0, group.rows, result if group.sources is None else result[group.sources])
        return out_THE

    def _whole_prompt(self, q_QHD: torch.Tensor, k_QKD: torch.Tensor, v_QKE: torch.Tensor) -> torch.Tensor:
        q_1HQD, k_1KQD, v_1KQE = (x.transpose(0, 1)[None] for x in (q_QHD, k_QKD, v_QKE))
        out_1HQE = functional.scaled_dot_product_attention(
            q_1HQD, k_1KQD, v_1KQE, is_causal=True, scale=self.spec.scale, enable_gqa=True
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
        q_QHD = q_THD if group.queries is None else q_THD[group.queries]
        q_SQHD = q_QHD.view(group.num_seqs, group.num_queries, *q_QHD.shape[1:])
        out_SHQE = self._attend(q_SQHD.transpose(1, 2), *self._gather(cache, group), group.mask)
        return out_SHQE.transpose(1, 2).flatten(0, 1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The fused kernel, or, where scores are capped, which it cannot do, plain float32 arithmetic.

        q has as many heads as k, or a multiple of it.
        """
        cap = self.spec.soft_cap
        if cap is None:
            return functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=self.spec.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        k, v = (x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = cap * torch.tanh(q.float() @ k.transpose(-1, -2) * (self.spec.scale / cap))
        if mask is not None:
            scores = scores + mask
        return (scores.softmax(-1) @ v).to(q.dtype)

    def _gather(self, cache: SlotCache, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
        """The group's keys (S, K, L, D) and values (S, K, L, E)."""
        assert group.slots is not None
        size = (group.num_seqs, -1, self.spec.num_kv_heads, self.spec.head_size)
        k = cache.k.index_select(0, group.slots).view(size).transpose(1, 2)
        if cache.v is cache.k:
            return k, k[..., : self._value_size]
        return k, cache.v.index_select(0, group.slots).view(size).transpose(1, 2)

    def _group(self, pieces: _Pieces, members: np.ndarray, block_tables: np.ndarray) -> _Group:
        lens_S, context_S = pieces.query_lens_P[members], pieces.seq_lens_P[members]
        num_queries = int(lens_S.max())
        queries, rows, sources = _rows(pieces.first_rows_P[members], lens_S, num_queries)
        slots = mask = None
        if not pieces.alone_P[members[0]]:
            lows_S = pieces.lows_P[members]
            key_SL = lows_S[:, None] + np.arange(int((context_S - lows_S).max()))
            token_SL = np.minimum(key_SL, context_S[:, None] - 1)
            block_SL = token_SL // self.shape.block_size
            id_SL = block_tables[pieces.sequences_P[members, None], block_SL].astype(np.int64)
            slots = torch.from_numpy(((id_SL - block_SL) * self.shape.block_size + token_SL).ravel())
            query_SQ = (context_S - lens_S)[:, None] + np.minimum(np.arange(num_queries), lens_S[:, None] - 1)
            mask = self._mask(query_SQ, key_SL)
        return _Group(
            num_seqs=len(members),
            num_queries=num_queries,
            queries=None if len(members) == len(pieces.first_rows_P) and sources is None else queries,
            slots=slots,
            first_row=int(pieces.first_rows_P[members[0]]),
            mask=mask,
            rows=rows,
            sources=sources,
        )

    def _mask(self, query_SQ: np.ndarray, key_SL: np.ndarray) -> torch.Tensor | None:
        """Additive mask over positions, (S, 1, Q, L); None if every query sees every key.

        With ALiBi the bias is in it, (S, H, Q, L); for a decode group (S, K, G, L), as its queries are laid out.
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
                mask = mask.view(len(query_SQ), self.spec.num_kv_heads, -1, mask.shape[-1])
            return mask
        if not hidden_SQL.any():
            return None
        return torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -torch.inf)

    def _cut(self, query_lens_S: np.ndarray, seq_lens_S: np.ndarray) -> _Pieces:
        """One piece per sequence, several for a chunk on so long a context that its mask would be too large.

        A piece is a run of queries with the context up to its last one.
        """
        alone_S = (query_lens_S == seq_lens_S) & (query_lens_S >= _MIN_ALONE)
        window = self.spec.sliding_window
        if self.spec.soft_cap is not None or self._slopes_H is not None:
            alone_S[:] = False
        elif window is not None:
            alone_S &= seq_lens_S <= window
        first_rows_S = np.cumsum(query_lens_S) - query_lens_S
        num_scores_S = query_lens_S * seq_lens_S * self._mask_heads
        num_pieces_S = np.where(alone_S, 1, np.minimum(-(-num_scores_S // _MAX_SCORES), query_lens_S))
        size_S = -(-query_lens_S // num_pieces_S)
        num_pieces_S = -(-query_lens_S // size_S)
        sequences_P = np.repeat(np.arange(len(query_lens_S)), num_pieces_S)
        index_P = np.arange(len(sequences_P)) - (np.cumsum(num_pieces_S) - num_pieces_S)[sequences_P]
        starts_P = index_P * size_S[sequences_P]
        stops_P = np.minimum(starts_P + size_S[sequences_P], query_lens_S[sequences_P])
        firsts_P = (seq_lens_S - query_lens_S)[sequences_P] + starts_P
        return _Pieces(
            sequences_P=sequences_P,
            first_rows_P=first_rows_S[sequences_P] + starts_P,
            query_lens_P=stops_P - starts_P,
            seq_lens_P=firsts_P + stops_P - starts_P,
            lows_P=np.zeros_like(firsts_P) if window is None else np.maximum(firsts_P - window + 1, 0),
            alone_P=alone_S[sequences_P],
        )


def _rows(
    first_rows_S: np.ndarray, lens_S: np.ndarray, num_queries: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A group's `queries`, `rows` and `sources`."""
    if num_queries == 1:
        queries = torch.from_numpy(first_rows_S)
        return queries, queries, None
    query_Q, lens_S1 = np.arange(num_queries), lens_S[:, None]
    queries_SQ = first_rows_S[:, None] + np.minimum(query_Q, lens_S1 - 1)
    queries = torch.from_numpy(queries_SQ.ravel())
    if lens_S.min() == num_queries:
        return queries, queries, None
    is_query_SQ = query_Q < lens_S1
    return queries, torch.from_numpy(queries_SQ[is_query_SQ]), torch.from_numpy(np.flatnonzero(is_query_SQ))


def _partition(pieces: _Pieces, max_tokens: int, max_scores: int) -> list[np.ndarray]:
    """Splits the pieces into groups of like query and context length, decodes apart from chunks."""
    query_lens, seq_lens, is_alone = pieces.query_lens_P, pieces.seq_lens_P - pieces.lows_P, pieces.alone_P
    groups: list[list[int]] = [[int(i)] for i in np.flatnonzero(is_alone)]
    rest = np.flatnonzero(~is_alone)
    order = rest[np.lexsort((rest, -seq_lens[rest], -query_lens[rest]))]
    members: list[int] = []
    num_queries = shortest = longest = 0
    for i in order.tolist():
        queries, context = int(query_lens[i]), int(seq_lens[i])
        low, high = min(shortest, context), max(longest, context)
        num_padded = (len(members) + 1) * high
        fits = (
            (queries == 1) == (num_queries == 1)
            and queries >= _MIN_FILL * num_queries
            and low >= _MIN_FILL * high
            and num_padded <= max_tokens
            and num_padded * num_queries <= max_scores
        )
        if members and fits:
            members.append(i)
            shortest, longest = low, high
        else:
            members = [i]
            groups.append(members)
            num_queries, shortest, longest = queries, context, context
    return [np.sort(np.array(g)) for g in groups]
