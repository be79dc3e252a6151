"""Paged attention on torch's fused scaled-dot-product kernel.

The fused kernel takes rectangles, a batch is ragged. So a step's sequences are sorted into groups of like query and
context length, each of them one gather and one kernel call per layer. A group's context is at most about a second-level
cache, so that the kernel reads what the gather has just written: the calls go with the size of the context, not with
the number of sequences. A longer prompt on its own needs no gather at all: it attends to the keys that it brings.

Shapes: T packed tokens, S sequences of a group, P pieces of them, Q queries, L context tokens, H query heads,
K kv-heads, G = H / K, D head size.
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
    """What is grouped: runs of queries of a sequence, at `first_rows_P` of the batch, at the end of a context."""

    sequences_P: np.ndarray
    first_rows_P: np.ndarray
    query_lens_P: np.ndarray
    seq_lens_P: np.ndarray


class SdpaAttention(SlotCacheOwner):
    """AttentionBackend of the CPU: grouped gathers and torch's fused attention."""

    name = "sdpa"

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator) -> None:
        super().__init__(shape, allocator)
        token_bytes = 2 * shape.num_kv_heads * shape.head_size * self._dtype.itemsize
        self._max_group_tokens = _GROUP_BYTES * torch.get_num_threads() // token_bytes

    def plan(self, metadata: AttentionMetadata) -> object:
        """Sorts the step's sequences into groups and builds their indices and masks."""
        pieces = _cut(metadata.query_lens_S.astype(np.int64), metadata.seq_lens_S.astype(np.int64))
        groups = tuple(
            self._group(pieces, members, metadata.block_tables_SB)
            for members in _partition(pieces, self._max_group_tokens)
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
                out_THD.index_copy_(0, group.rows, result if group.sources is None else result[group.sources])
        return out_THD

    def _whole_prompt(self, q_QHD: torch.Tensor, k_QKD: torch.Tensor, v_QKD: torch.Tensor) -> torch.Tensor:
        q_1HQD, k_1KQD, v_1KQD = (x.transpose(0, 1)[None] for x in (q_QHD, k_QKD, v_QKD))
        out_1HQD = functional.scaled_dot_product_attention(
            q_1HQD, k_1KQD, v_1KQD, is_causal=True, scale=self.shape.scale, enable_gqa=True
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
        q_QHD = q_THD if group.queries is None else q_THD[group.queries]
        q_SQHD = q_QHD.view(group.num_seqs, group.num_queries, *q_QHD.shape[1:])
        k_SKLD, v_SKLD = self._gather(cache, group)
        out_SHQD = functional.scaled_dot_product_attention(
            q_SQHD.transpose(1, 2), k_SKLD, v_SKLD, attn_mask=group.mask, scale=self.shape.scale, enable_gqa=True
        )
        return out_SHQD.transpose(1, 2).flatten(0, 1)

    def _gather(self, cache: SlotCache, group: _Group) -> tuple[torch.Tensor, torch.Tensor]:
        """The group's keys and values, (S, K, L, D)."""
        assert group.slots is not None
        size = (group.num_seqs, -1, self.shape.num_kv_heads, self.shape.head_size)
        k, v = (x.index_select(0, group.slots).view(size).transpose(1, 2) for x in (cache.k, cache.v))
        return k, v

    def _group(self, pieces: _Pieces, members: np.ndarray, block_tables: np.ndarray) -> _Group:
        lens_S, context_S = pieces.query_lens_P[members], pieces.seq_lens_P[members]
        num_queries, num_tokens = int(lens_S.max()), int(context_S.max())
        queries, rows, sources = _rows(pieces.first_rows_P[members], lens_S, num_queries)
        if len(members) == 1 and num_queries == num_tokens and num_queries > 1:
            slots = mask = None
        else:
            token_SL = np.minimum(np.arange(num_tokens), context_S[:, None] - 1)
            block_SL = token_SL // self.shape.block_size
            id_SL = block_tables[pieces.sequences_P[members, None], block_SL].astype(np.int64)
            slots = torch.from_numpy(((id_SL - block_SL) * self.shape.block_size + token_SL).ravel())
            mask = self._mask(num_queries, num_tokens, lens_S[:, None], context_S[:, None])
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


def _cut(query_lens_S: np.ndarray, seq_lens_S: np.ndarray) -> _Pieces:
    """One piece per sequence, several for a chunk on so long a context that its mask would be too large.

    A piece is a run of queries with the context up to its last one.
    """
    first_rows_S = np.cumsum(query_lens_S) - query_lens_S
    num_pieces_S = np.where(_is_alone(query_lens_S, seq_lens_S), 1, -(-query_lens_S * seq_lens_S // _MAX_SCORES))
    size_S = -(-query_lens_S // num_pieces_S)
    num_pieces_S = -(-query_lens_S // size_S)
    sequences_P = np.repeat(np.arange(len(query_lens_S)), num_pieces_S)
    index_P = np.arange(len(sequences_P)) - (np.cumsum(num_pieces_S) - num_pieces_S)[sequences_P]
    starts_P = index_P * size_S[sequences_P]
    stops_P = np.minimum(starts_P + size_S[sequences_P], query_lens_S[sequences_P])
    return _Pieces(
        sequences_P=sequences_P,
        first_rows_P=first_rows_S[sequences_P] + starts_P,
        query_lens_P=stops_P - starts_P,
        seq_lens_P=(seq_lens_S - query_lens_S)[sequences_P] + stops_P,
    )


def _is_alone(query_lens: np.ndarray, seq_lens: np.ndarray) -> np.ndarray:
    alone: np.ndarray = (query_lens == seq_lens) & (query_lens >= _MIN_ALONE)
    return alone


def _partition(pieces: _Pieces, max_tokens: int) -> list[np.ndarray]:
    """Splits the pieces into groups of like query and context length, decodes apart from chunks."""
    query_lens, seq_lens = pieces.query_lens_P, pieces.seq_lens_P
    is_alone = _is_alone(query_lens, seq_lens)
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
            and num_padded * num_queries <= _MAX_SCORES
        )
        if members and fits:
            members.append(i)
            shortest, longest = low, high
        else:
            members = [i]
            groups.append(members)
            num_queries, shortest, longest = queries, context, context
    return [np.sort(np.array(g)) for g in groups]
