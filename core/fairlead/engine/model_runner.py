"""Runs one step on one platform: the only place where model, cache, attention backends and sampler meet."""

import itertools
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import cast

import torch

from fairlead.engine.batch_builder import ModelInput, build_input
from fairlead.engine.padded_model import PaddedModel
from fairlead.interface import AttentionBackend, GraphRunner, HostCache, KVCache
from fairlead.layers.context import Step, StepGroup
from fairlead.models.registry import CausalLM
from fairlead.ops.table import Ops
from fairlead.request import TokenLogprobs
from fairlead.sampling.logprobs import token_logprobs
from fairlead.sampling.sampler import SamplingBatch, sample
from fairlead.sampling.structured.policy import PendingBitmask, TokenBitmask
from fairlead.scheduling.batch import BlockCopy, CopyKind, SampleContext, SampledToken, ScheduledBatch, StepResult

_MAX_ROWS = 256  # of prompt log-probabilities at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """A step that is ready to run."""

    batch: ScheduledBatch
    inputs: ModelInput
    step: Step


class ModelRunner:
    """Shared by all platforms, and made of the parts that they supply; a plugin never subclasses it.

    `backends` has one attention backend per cache group. Where the graph runner has buckets, the cache has a block
    more per group than the scheduler knows of: `padding_blocks`, in which padding lives.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        backends: Seq[AttentionBackend],
        *,
        block_size: int,
        device: torch.device,
        ops: Ops,
        graph_runner: GraphRunner,
    ) -> None:
        self.model = cast(CausalLM, model)
        self.padded = PaddedModel(self.model, graph_runner)
        self.backends = tuple(backends)
        self.kv_caches: list[list[KVCache]] = []
        self.host_caches: list[list[HostCache]] = []
        self.padding_blocks: tuple[int, ...] = ()
        self.block_size, self.device = block_size, device
        self._ops = ops
        self._sampled_R: torch.Tensor | None = None  # by the latest step, on the device

    def allocate_cache(self, num_blocks: Seq[int]) -> None:
        """Allocates the KV cache, so many blocks per group, and the padding's; freed with the runner."""
        num_more = 1 if self.padded.buckets else 0
        self.padding_blocks = tuple(n - 1 + num_more for n in num_blocks)
        self.kv_caches = [b.allocate(n + num_more) for b, n in zip(self.backends, num_blocks, strict=True)]

    def allocate_host_cache(self, num_blocks: Seq[int]) -> None:
        """Allocates the host's blocks, so many per group; freed with the runner, or by `free_host_cache`."""
        self.host_caches = [b.allocate_host(n) for b, n in zip(self.backends, num_blocks, strict=True)]

    def free_host_cache(self) -> None:
        """Gives the host's memory back."""
        self.host_caches = []

    @torch.inference_mode()
    def copy_blocks(self, copies: Iterable[BlockCopy]) -> None:
        """Copies blocks in the order given; waits for nothing."""
        for (kind, group), run in itertools.groupby(copies, key=lambda c: (c.kind, c.group)):
            backend, kv_cache = self.backends[group], self.kv_caches[group]
            pairs = [(c.source, c.destination) for c in run]
            if kind is CopyKind.WITHIN:
                backend.copy_blocks(kv_cache, pairs)
            elif kind is CopyKind.OUT:
                backend.copy_to_host(kv_cache, self.host_caches[group], pairs)
            else:
                backend.copy_from_host(self.host_caches[group], kv_cache, pairs)

    @torch.inference_mode()
    def prepare(self, batch: ScheduledBatch) -> PreparedStep:
        """Makes what a step needs on the device. May be called while the step before runs."""
        most = max(c.num_tokens for c in batch.chunks)
        padding = self.padded.padding(batch.num_tokens, most, self.padding_blocks)
        inputs = build_input(batch, self.block_size, self.device, padding)
        parts = zip(self.backends, self.kv_caches, inputs.attention, strict=True)
        step = Step(groups=tuple(StepGroup(backend=b, kv_caches=c, plan=b.plan(m)) for b, c, m in parts))
        return PreparedStep(batch=batch, inputs=inputs, step=step)

    @torch.inference_mode()
    def forward(self, prepared: PreparedStep) -> torch.Tensor:
        """Runs the model; fills the cache as a side effect. Steps come in order, each forward and then sample."""
        inputs = prepared.inputs
        if inputs.pending_rows_P is not None:
            assert self._sampled_R is not None
            inputs.token_ids_T[inputs.pending_rows_P] = self._sampled_R[inputs.pending_sources_P]
        self.copy_blocks(prepared.batch.block_copies)
        return self.padded.hidden(inputs.token_ids_T, inputs.positions_T, prepared.step)

    @torch.inference_mode()
    def sample(
        self,
        prepared: PreparedStep,
        hidden_TE: torch.Tensor,
        contexts: Mapping[int, SampleContext],
        bitmask: PendingBitmask | None,
    ) -> StepResult:
        """Samples after `forward`. `contexts` are those of `Scheduler.sample_contexts`.

        `bitmask` is what the rows with a grammar may sample; it is waited for.
        """
        batch = prepared.batch
        samplers = [c for c in batch.chunks if c.sample_seed is not None]
        sampled: list[SampledToken] = []
        if samplers:
            logits_RV = self.padded.logits(hidden_TE[prepared.inputs.sample_rows_R])
            allowed_RV = None if bitmask is None else self._masked(logits_RV, bitmask.wait())
            sampled, self._sampled_R = sample(logits_RV, SamplingBatch.of(samplers, contexts), allowed_RV, self._ops)
        return StepResult(sampled=sampled, prompt_logprobs=self._prompt_logprobs(batch, hidden_TE))

    def _prompt_logprobs(self, batch: ScheduledBatch, hidden_TE: torch.Tensor) -> dict[int, list[TokenLogprobs]]:
        """By seq_id. A few rows at a time: the logits of a whole chunk can be larger than the model."""
        found: dict[int, list[TokenLogprobs]] = {}
        first_row = 0
        for chunk in batch.chunks:
            extras, wanted = chunk.extras, chunk.params.prompt_logprobs
            if extras is not None and extras.prompt_targets and wanted is not None:
                rows = found[chunk.seq_id] = []
                targets_N = torch.tensor(extras.prompt_targets, device=hidden_TE.device)
                hidden_NE = hidden_TE[first_row + extras.prompt_row :][: len(targets_N)]
                for i in range(0, len(targets_N), _MAX_ROWS):
                    logprobs_RV = self.padded.logits(hidden_NE[i : i + _MAX_ROWS]).log_softmax(-1)
                    targets_R = targets_N[i : i + _MAX_ROWS]
                    rows += token_logprobs(logprobs_RV, targets_R, [wanted] * len(targets_R))
            first_row += chunk.num_tokens
        return found

    def _masked(self, logits_RV: torch.Tensor, bitmask: TokenBitmask) -> torch.Tensor:
        words = torch.from_numpy(bitmask.words_RW).to(self.device)
        if len(bitmask.rows_R) == len(logits_RV):
            return self._ops.apply_token_bitmask(logits_RV, words)
        rows = torch.from_numpy(bitmask.rows_R).to(self.device)
        masked_RV = logits_RV.clone()
        masked_RV[rows] = self._ops.apply_token_bitmask(logits_RV[rows], words)
        return masked_RV
