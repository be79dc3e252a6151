"""From the scheduler's integers to the model's tensors. Torch enters here.

Shapes: T packed tokens, S sequences, R sequences that sample, P tokens that the step before samples, B blocks of the
longest table.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from fairlead.interface import AttentionMetadata
from fairlead.scheduling.batch import ScheduledBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """One step's tensors, on the device. `sample_rows_R` are the packed rows whose logits are wanted.

    The tokens of the rows `pending_rows_P` are those that the step before samples in its rows `pending_sources_P`; None
    where all tokens are known.
    """

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    sample_rows_R: torch.Tensor
    pending_rows_P: torch.Tensor | None
    pending_sources_P: torch.Tensor | None
    attention: tuple[AttentionMetadata, ...]  # per cache group


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Rows that fill a step up, behind its own: prompts of at most a block, all in one block of each cache group."""

    num_tokens: int
    blocks: tuple[int, ...]

    def query_lens(self, block_size: int) -> list[int]:
        """Tokens of each of the prompts."""
        num_whole, rest = divmod(self.num_tokens, block_size)
        return [block_size] * num_whole + [rest] * (rest > 0)


def build_input(
    batch: ScheduledBatch, block_size: int, device: torch.device, padding: Padding | None = None
) -> ModelInput:
    """Packs the chunks of a step one behind the other. With padding there may be no chunk."""
    chunks = batch.chunks
    num_seqs = len(chunks)
    query_lens_S = np.fromiter((c.num_tokens for c in chunks), np.int32, num_seqs)
    starts_S = np.fromiter((c.start for c in chunks), np.int32, num_seqs)
    num_tokens = int(query_lens_S.sum())
    token_ids_T = np.fromiter(chain.from_iterable(c.token_ids or (0,) for c in chunks), np.int64, num_tokens)
    samples_S = np.fromiter((c.sample_seed is not None for c in chunks), np.bool_, num_seqs)
    num_padded = 0
    if padding is not None:
        padded_lens = padding.query_lens(block_size)
        num_padded = len(padded_lens)
        query_lens_S = np.append(query_lens_S, np.array(padded_lens, np.int32))
        starts_S, samples_S = np.pad(starts_S, (0, num_padded)), np.pad(samples_S, (0, num_padded))
        token_ids_T = np.pad(token_ids_T, (0, padding.num_tokens))
        num_tokens += padding.num_tokens
    ends_S = np.cumsum(query_lens_S)
    pending = [
        (end - 1, c.source_row) for end, c in zip(ends_S.tolist(), chunks, strict=False) if c.source_row is not None
    ]
    pending_P2 = torch.tensor(pending, dtype=torch.int64).to(device) if pending else None

    sequence_T = np.repeat(np.arange(num_seqs + num_padded), query_lens_S)
    positions_T = np.arange(num_tokens) - np.repeat(ends_S - query_lens_S, query_lens_S) + starts_S[sequence_T]

    def metadata(group: int) -> AttentionMetadata:
        tables = [c.block_tables[group] for c in chunks]
        if padding is not None:
            tables += [(0, (padding.blocks[group],))] * num_padded
        block_tables_SB = _block_tables(tables)
        blocks_T = block_tables_SB[sequence_T, positions_T // block_size]
        return AttentionMetadata(
            query_lens_S=query_lens_S,
            seq_lens_S=starts_S + query_lens_S,
            block_tables_SB=block_tables_SB,
            slot_mapping_T=(blocks_T * block_size + positions_T % block_size).astype(np.int32),
        )

    num_groups = len(chunks[0].block_tables) if padding is None else len(padding.blocks)
    return ModelInput(
        token_ids_T=torch.from_numpy(token_ids_T).to(device),
        positions_T=torch.from_numpy(positions_T).to(device),
        sample_rows_R=torch.from_numpy((ends_S - 1)[samples_S]).to(device),
        pending_rows_P=None if pending_P2 is None else pending_P2[:, 0],
        pending_sources_P=None if pending_P2 is None else pending_P2[:, 1],
        attention=tuple(metadata(group) for group in range(num_groups)),
    )


def _block_tables(tables: list[tuple[int, tuple[int, ...]]]) -> np.ndarray:
    """(S, B) int32; 0 where a sequence has no block."""
    block_tables_SB = np.zeros((len(tables), max(first + len(blocks) for first, blocks in tables)), np.int32)
    for row, (first, blocks) in zip(block_tables_SB, tables, strict=True):
        row[first : first + len(blocks)] = blocks
    return block_tables_SB
