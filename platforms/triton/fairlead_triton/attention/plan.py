"""One step as the kernels read it: all its integers in one run of int32 words, one copy to the device.

    word 0, 1   number of decode tiles, number of merges
    SLOTS_AT    the slot of each packed token (T)
    merges_at   entries of ENTRY words: row, first partial, splits, tiles a split, query
    decodes_at  entries: first row, query length, sequence length, table, tile, split, partial or -1
    prompts_at  entries: first row, query length, sequence length, table, tile; those with most keys first
    (the rest)  block tables one behind the other, each from the first block that its sequence still sees

`table` is the word that holds, or would hold, the sequence's first block. A sequence of few rows (queries times heads
of a kv-head), or of no more than a block, as the core's padding is, goes to the decode kernel; the others to the prompt
kernel. That, its tiles and its splits depend on the sequence alone.

**Graphs.** In a plan of decodes alone, what is launched depends on the number of packed tokens and nothing else: the
merges have room for an entry a token, the lists' lengths are read on the device. Its words and partial results lie in
memory that the backend keeps, at addresses that stay (`StepMemory`). Such a plan says `replayable`: a capture of one
plan serves every other of as many tokens. `plan()` itself touches the host alone; `load()` copies the words to where
the kernels read them, in the order of the current stream, so that plans may be made before earlier steps have run. A
graph runner calls `load()` before each replay and before a capture (a copy inside one would be replayed, too); without
one, the first layer's `forward` does. A plan that is not `replayable` runs as it comes.

Shapes: T packed tokens, S sequences, W entries of a list, B blocks of a table.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fairlead.interface import AttentionMetadata, AttentionSpec

SLOTS_AT = 8
ENTRY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSizes:
    """What of a backend decides how a step is cut. `max_decode_rows` bounds a sequence's rows in the decode kernel.

    Tiles are in rows, `split` in tokens. `max_words` and `max_partials` (tiles of decodes in parts) are those of the
    memory that is kept.
    """

    block_size: int
    decode_tile: int
    prompt_tile: int
    max_decode_rows: int
    split: int
    max_words: int
    max_partials: int


class StepMemory:
    """The device's memory for the words and partial results of steps, and which plan's words it holds now.

    Steps run in order, so all plans that fit share it. The others get some of their own.
    """

    def __init__(self, sizes: PlanSizes, partial_shape: tuple[int, int, int], device: torch.device) -> None:
        """`partial_shape` is (K, rows of a tile, value size)."""
        self._partial_shape, self._device = partial_shape, device
        self.words = torch.empty(sizes.max_words, dtype=torch.int32, device=device)
        self.partials, self.partial_ml = self.make_partials(sizes.max_partials)
        self.resident: object = None

    def make_partials(self, num_partials: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Uninitialised results (n, K, M, E), and largest scores and sums (n, K, 2, M), in float32."""
        heads, rows, value_size = self._partial_shape
        results = torch.empty((num_partials, heads, rows, value_size), dtype=torch.float32, device=self._device)
        return results, torch.empty((num_partials, heads, 2, rows), dtype=torch.float32, device=self._device)


class TritonPlan:
    """One step. Its tensors on the device are valid from `load` on, which may be called any number of times."""

    __slots__ = (
        "_memory", "_num_partials", "_staging", "decodes_at", "merge_grid", "merges_at", "num_decodes", "num_prompts",
        "num_tokens", "partial_ml", "partials", "prompts_at", "replayable", "words",
    )  # fmt: skip

    words: torch.Tensor
    partials: torch.Tensor
    partial_ml: torch.Tensor

    def __init__(
        self, memory: StepMemory, staging: torch.Tensor, *, num_tokens: int, num_decodes: int, num_prompts: int,
        merge_grid: int, merges_at: int, decodes_at: int, prompts_at: int, num_partials: int,
    ) -> None:  # fmt: skip
        """`staging` are the words on the host; the plan keeps them until the copy is over."""
        self._memory, self._staging, self._num_partials = memory, staging, num_partials
        self.num_tokens, self.num_decodes, self.num_prompts = num_tokens, num_decodes, num_prompts
        self.merge_grid, self.merges_at, self.decodes_at, self.prompts_at = (
            merge_grid,
            merges_at,
            decodes_at,
            prompts_at,
        )
        has_room = len(staging) <= len(memory.words) and num_partials <= len(memory.partials)
        self.replayable = has_room and num_prompts == 0
        """Whether any plan of as many tokens that says so, too, can be run by a replay of this one's launches."""
        if has_room:
            self.words, self.partials, self.partial_ml = memory.words, memory.partials, memory.partial_ml

    def load(self) -> None:
        """Puts the words where the kernels read them, behind all that the current stream was asked for before."""
        if self._memory.resident is self:
            return
        if not hasattr(self, "words"):  # made here, for the stream that uses them
            self.words = torch.empty(len(self._staging), dtype=torch.int32, device=self._memory.words.device)
            self.partials, self.partial_ml = self._memory.make_partials(self._num_partials)
        self._memory.resident = self
        self.words[: len(self._staging)].copy_(self._staging, non_blocking=True)


class Planner:
    """Cuts steps into tiles."""

    def __init__(self, spec: AttentionSpec, sizes: PlanSizes, memory: StepMemory, *, pin_memory: bool) -> None:
        self._sizes, self._memory, self._pin = sizes, memory, pin_memory
        self._group = spec.num_heads // spec.num_kv_heads
        self._window = spec.sliding_window

    def plan(self, metadata: AttentionMetadata) -> TritonPlan:
        """Lays out a step, on the host alone."""
        sizes, group = self._sizes, self._group
        query_lens_S, seq_lens_S = metadata.query_lens_S.astype(np.int64), metadata.seq_lens_S.astype(np.int64)
        num_tokens, rows_S = len(metadata.slot_mapping_T), query_lens_S * group
        is_decode_S = (query_lens_S == 1) | (rows_S <= sizes.max_decode_rows) | (seq_lens_S <= sizes.block_size)
        lows_S = np.zeros_like(seq_lens_S)
        if self._window is not None:
            lows_S = np.maximum(seq_lens_S - query_lens_S - self._window + 1, 0)
        first_blocks_S = lows_S // sizes.block_size
        num_blocks_S = -(-seq_lens_S // sizes.block_size) - first_blocks_S
        ends_S = np.cumsum(num_blocks_S)
        sequences = _Sequences(
            first_rows_S=np.cumsum(query_lens_S) - query_lens_S,
            query_lens_S=query_lens_S,
            seq_lens_S=seq_lens_S,
            tables_S=ends_S - num_blocks_S - first_blocks_S,
        )
        decodes = np.flatnonzero(is_decode_S)
        decode_W8, merge_W8, num_partials = self._decodes(sequences, decodes, rows_S, lows_S)
        all_decode = len(decodes) == len(seq_lens_S)
        prompt_W8 = self._prompts(sequences, np.flatnonzero(~is_decode_S), rows_S)

        merges_at = SLOTS_AT + num_tokens
        merge_grid = num_tokens if all_decode else len(merge_W8)
        decodes_at = merges_at + merge_grid * ENTRY
        prompts_at = decodes_at + decode_W8.size
        tables_at = prompts_at + prompt_W8.size
        decode_W8[:, 3] += tables_at
        prompt_W8[:, 3] += tables_at
        num_blocks = int(ends_S[-1]) if len(ends_S) else 0
        staging = torch.empty(tables_at + num_blocks, dtype=torch.int32, pin_memory=self._pin)
        words = staging.numpy()
        words[:SLOTS_AT] = 0
        words[0], words[1] = len(decode_W8), len(merge_W8)
        words[SLOTS_AT:merges_at] = metadata.slot_mapping_T
        words[merges_at : merges_at + merge_W8.size] = merge_W8.ravel()
        words[decodes_at:prompts_at] = decode_W8.ravel()
        words[prompts_at:tables_at] = prompt_W8.ravel()
        starts_S = np.arange(len(seq_lens_S)) * metadata.block_tables_SB.shape[1] + first_blocks_S
        index = np.arange(num_blocks) + np.repeat(starts_S - (ends_S - num_blocks_S), num_blocks_S)
        words[tables_at:] = metadata.block_tables_SB.reshape(-1)[index]
        return TritonPlan(
            self._memory, staging, num_tokens=num_tokens, num_decodes=len(decode_W8), num_prompts=len(prompt_W8),
            merge_grid=merge_grid, merges_at=merges_at, decodes_at=decodes_at, prompts_at=prompts_at,
            num_partials=num_partials,
        )  # fmt: skip

    def _decodes(
        self, sequences: "_Sequences", members: np.ndarray, rows_S: np.ndarray, lows_S: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """Entries of the decode kernel, tiles of one split (the same keys) side by side, and those of the merges."""
        split = self._sizes.split
        tiles_N = -(-rows_S[members] // self._sizes.decode_tile)
        first_splits_N = lows_S[members] // split
        splits_N = (sequences.seq_lens_S[members] - 1) // split - first_splits_N + 1
        num_N = tiles_N * splits_N
        ends_N = np.cumsum(np.where(splits_N > 1, num_N, 0))
        partials_N = np.where(splits_N > 1, ends_N - num_N, -1)

        owner_W, index_W = _spread(num_N)
        decode_W8 = sequences.entries(members[owner_W])
        decode_W8[:, 4] = index_W % tiles_N[owner_W]
        decode_W8[:, 5] = index_W // tiles_N[owner_W] + first_splits_N[owner_W]
        decode_W8[:, 6] = np.where(partials_N[owner_W] < 0, -1, partials_N[owner_W] + index_W)

        apart = np.flatnonzero(splits_N > 1)
        owner_W, index_W = _spread(sequences.query_lens_S[members[apart]])
        merged = apart[owner_W]
        merge_W8 = np.zeros((len(merged), ENTRY), np.int64)
        merge_W8[:, 0] = sequences.first_rows_S[members[merged]] + index_W
        merge_W8[:, 1], merge_W8[:, 2], merge_W8[:, 3] = partials_N[merged], splits_N[merged], tiles_N[merged]
        merge_W8[:, 4] = index_W
        return decode_W8, merge_W8, int(ends_N[-1]) if len(ends_N) else 0

    def _prompts(self, sequences: "_Sequences", members: np.ndarray, rows_S: np.ndarray) -> np.ndarray:
        """The entries of the prompt kernel. The longest first: what comes last should end soon."""
        tile = self._sizes.prompt_tile
        owner_W, index_W = _spread(-(-rows_S[members] // tile))
        prompt_W8 = sequences.entries(members[owner_W])
        prompt_W8[:, 4] = index_W
        last_W = np.minimum(((index_W + 1) * tile - 1) // self._group, prompt_W8[:, 1] - 1)
        return prompt_W8[np.argsort(-(prompt_W8[:, 2] - prompt_W8[:, 1] + last_W), kind="stable")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequences:
    first_rows_S: np.ndarray
    query_lens_S: np.ndarray
    seq_lens_S: np.ndarray
    tables_S: np.ndarray

    def entries(self, sequence_W: np.ndarray) -> np.ndarray:
        """Entries of these sequences, the rest of each 0."""
        entries_W8 = np.zeros((len(sequence_W), ENTRY), np.int64)
        columns = (self.first_rows_S, self.query_lens_S, self.seq_lens_S, self.tables_S)
        for i, column_S in enumerate(columns):
            entries_W8[:, i] = column_S[sequence_W]
        return entries_W8


def _spread(num_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For n = (2, 1): owners (0, 0, 1) and places (0, 1, 0)."""
    owner_W = np.repeat(np.arange(len(num_N)), num_N)
    starts_N = np.cumsum(num_N) - num_N
    return owner_W, np.arange(len(owner_W)) - starts_N[owner_W]
