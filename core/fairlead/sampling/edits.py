"""What is done to logits before temperature and the cuts: processors, masks, bias, penalties.

All of it follows from the sequence's tokens, anew in each step: no state outlives a step, so that preemption, forks
and whatever shares the batch change no token. Only the places that a request names or has used are read and written,
as flat indices into the logits, since a vocabulary is a thousand times as wide.

Shapes: S sequences, V vocabulary, P rows with penalties, N places (one per row and token), R rows with allowed tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch

from fairlead import plugins
from fairlead.interface import LogitsProcessor
from fairlead.ops import reference
from fairlead.sampling_params import stop_tokens
from fairlead.scheduling.batch import SampleContext

_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = float(np.finfo(np.float32).tiny)


class SamplingOps(Protocol):
    """The ops that sampling calls, as in `fairlead.ops.reference`; a platform may have its own."""

    @property
    def apply_penalties(
        self,
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]: ...

    @property
    def draw(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]: ...

    @property
    def draw_filtered(self) -> Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Some tokens of some rows."""

    row_N: np.ndarray
    token_N: np.ndarray

    @classmethod
    def of(cls, tokens_by_row: Iterable[tuple[int, Seq[int]]]) -> "_Places | None":
        """None if there is no token at all."""
        groups = [(row, tokens) for row, tokens in tokens_by_row if tokens]
        if not groups:
            return None
        return cls(
            row_N=np.repeat([row for row, _ in groups], [len(tokens) for _, tokens in groups]),
            token_N=np.concatenate([np.fromiter(tokens, np.int64, len(tokens)) for _, tokens in groups]),
        )

    def within(self, num_tokens: int) -> np.ndarray:
        """Which of them the vocabulary has (a stop token may be beyond it)."""
        is_within_N: np.ndarray = self.token_N < num_tokens
        return is_within_N

    def flat(self, num_tokens: int) -> np.ndarray:
        """Indices into the flat logits of those that the vocabulary has."""
        flat_N: np.ndarray = (self.row_N * num_tokens + self.token_N)[self.within(num_tokens)]
        return flat_N


@dataclass(frozen=True, slots=True, kw_only=True)
class _Penalties:
    """The tokens that the penalised rows have used, one entry per use, and the penalties of their rows."""

    used: _Places
    is_output_N: np.ndarray
    repetition_S: np.ndarray  # float32, as are the other two; indexed by row
    frequency_S: np.ndarray
    presence_S: np.ndarray

    @classmethod
    def of(cls, contexts: Seq[tuple[int, SampleContext]], num_rows: int) -> "_Penalties | None":
        rows = [(row, context) for row, context in contexts if context.request.params.is_penalised]
        used = _Places.of((row, context.token_ids) for row, context in rows)
        if used is None:
            return None
        lengths = [len(part) for _, context in rows for part in (context.prompt, context.output)]
        of_row = np.zeros((3, num_rows))
        of_row[:, [row for row, _ in rows]] = [
            [context.request.params.repetition_penalty for _, context in rows],
            [context.request.params.frequency_penalty for _, context in rows],
            [context.request.params.presence_penalty for _, context in rows],
        ]
        of_row[0] = of_row[0].clip(_SMALLEST, _LARGEST)
        repetition_S, frequency_S, presence_S = of_row.astype(np.float32)
        return cls(
            used=used,
            is_output_N=np.repeat([False, True] * len(rows), lengths),
            repetition_S=repetition_S,
            frequency_S=frequency_S,
            presence_S=presence_S,
        )

    def apply(self, logits_SV: torch.Tensor, ops: SamplingOps) -> None:
        """Changes the logits in place, at every token that its row has used."""
        num_tokens = logits_SV.shape[1]
        # One sort, with the flag as the lowest bit: np.unique with its inverse takes four times as long.
        used_N = np.sort(self.used.flat(num_tokens) * 2 + self.is_output_N[self.used.within(num_tokens)])
        first_N = np.flatnonzero(np.diff(used_N >> 1, prepend=-1))
        flat_N = used_N[first_N] >> 1
        count_N = np.add.reduceat(used_N & 1, first_N).astype(np.float32)
        row_N = flat_N // num_tokens
        device = logits_SV.device
        index_N = torch.from_numpy(flat_N).to(device)
        factors = np.stack((self.repetition_S[row_N], self.frequency_S[row_N] * count_N))
        repetition_N, frequency_N = torch.from_numpy(factors).to(device)
        presence_N = torch.from_numpy(self.presence_S[row_N] * (count_N > 0)).to(device)
        ops.apply_penalties(logits_SV, index_N, repetition_N, frequency_N, presence_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitEdits:
    """The edits of a step's rows, on the host."""

    processed: tuple[tuple[int, SampleContext], ...]
    allowed_rows: tuple[int, ...]
    allowed: _Places | None
    biased: _Places | None
    bias_N: np.ndarray
    banned: _Places | None
    penalties: _Penalties | None

    @classmethod
    def of(cls, context_of: Mapping[int, SampleContext], num_rows: int) -> "LogitEdits | None":
        """Collects the edits of a step, whose sampled tokens have these contexts, by row; None if there are none."""
        contexts = list(context_of.items())
        if not contexts:
            return None
        allowed = [(row, ids) for row, c in contexts if (ids := c.request.params.allowed_token_ids) is not None]
        biases = [(row, bias) for row, c in contexts if (bias := c.request.params.logit_bias) is not None]
        return cls(
            processed=tuple((row, c) for row, c in contexts if c.request.params.logits_processors),
            allowed_rows=tuple(row for row, _ in allowed),
            allowed=_Places.of(allowed),
            biased=_Places.of((row, tuple(bias)) for row, bias in biases),
            bias_N=np.array([value for _, bias in biases for value in bias.values()], dtype=np.float32),
            banned=_Places.of((row, list(_banned(c))) for row, c in contexts),
            penalties=_Penalties.of(contexts, num_rows),
        )

    def apply(self, logits_SV: torch.Tensor, ops: SamplingOps = reference) -> tuple[torch.Tensor, dict[int, str]]:
        """The edited logits, a new tensor, and what went wrong in which row."""
        num_tokens, device = logits_SV.shape[1], logits_SV.device
        edited_SV = logits_SV.clone(memory_format=torch.contiguous_format)
        flat_L = edited_SV.view(-1)
        errors: dict[int, str] = {}
        for row, context in self.processed:
            error = _process(edited_SV, row, context)
            if error is not None:
                errors[row] = error
        if self.allowed is not None:
            index_N = torch.from_numpy(self.allowed.flat(num_tokens)).to(device)
            kept_N = flat_L[index_N]
            edited_SV[torch.tensor(self.allowed_rows, device=device)] = -torch.inf
            flat_L[index_N] = kept_N
        if self.biased is not None:
            index_N = torch.from_numpy(self.biased.flat(num_tokens)).to(device)
            flat_L[index_N] += torch.from_numpy(self.bias_N[self.biased.within(num_tokens)]).to(device)
        if self.banned is not None:
            flat_L[torch.from_numpy(self.banned.flat(num_tokens)).to(device)] = -torch.inf
        if self.penalties is not None:
            self.penalties.apply(edited_SV, ops)
        return edited_SV, errors


def _banned(context: SampleContext) -> Iterator[int]:
    """Tokens that min_tokens and bad words forbid next."""
    request, output = context.request, context.output
    if len(output) < request.params.min_tokens:
        yield from stop_tokens(request.params, request.eos_token_ids)
    for word in request.bad_words_token_ids:
        *before, last = word
        if len(before) <= len(output) and output[len(output) - len(before) :] == tuple(before):
            yield last


def _process(edited_SV: torch.Tensor, row: int, context: SampleContext) -> str | None:
    """Puts one row through the processors of its request; returns what went wrong."""
    for wanted in context.request.params.logits_processors:
        name = wanted if isinstance(wanted, str) else getattr(wanted, "__qualname__", type(wanted).__qualname__)
        try:
            found = plugins.load_logits_processor(wanted) if isinstance(wanted, str) else wanted
            logits_V: object = cast(LogitsProcessor, found)(edited_SV[row].clone(), context.prompt, context.output)
        except Exception as error:
            return f"the logits processor {name!r:.100} raised {type(error).__name__}: {error!s:.200}"
        if not isinstance(logits_V, torch.Tensor) or logits_V.shape != edited_SV[row].shape:
            got = getattr(logits_V, "shape", type(logits_V).__name__)
            return f"the logits processor {name!r:.100} must return the logits, of equal shape, but gave {got}"
        edited_SV[row] = logits_V
    return None
