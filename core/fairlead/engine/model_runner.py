"""Runs one step on one platform: the only place where model, cache, attention backends and sampler meet."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import cast

import torch

from fairlead.engine.batch_builder import build_input
from fairlead.interface import AttentionBackend, KVCache
from fairlead.layers.context import Step, StepGroup
from fairlead.models.registry import CausalLM
from fairlead.sampling.sampler import SamplingBatch, sample
from fairlead.sampling.structured.policy import PendingBitmask, TokenBitmask
from fairlead.scheduling.batch import SampledToken, ScheduledBatch


class ModelRunner:
    """Shared by all platforms, and made of the parts that they supply; a plugin never subclasses it.

    `backends` has one attention backend per cache group.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        backends: Seq[AttentionBackend],
        *,
        block_size: int,
        device: torch.device,
        apply_token_bitmask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        self.model = cast(CausalLM, model)
        self.backends = tuple(backends)
        self.kv_caches: list[list[KVCache]] = []
        self._block_size, self._device = block_size, device
        self._apply_token_bitmask = apply_token_bitmask

    def allocate_cache(self, num_blocks: Seq[int]) -> None:
        """Allocates the KV cache, so many blocks per group; freed with the runner."""
        self.kv_caches = [b.allocate(n) for b, n in zip(self.backends, num_blocks, strict=True)]

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch, bitmask: PendingBitmask | None = None) -> list[SampledToken]:
        """Computes a step; one entry per chunk that samples, in order. Fills the cache as a side effect.

        `bitmask` is what the rows with a grammar may sample; it is waited for once the model has run.
        """
        inputs = build_input(batch, self._block_size, self._device)
        for group, source, destination in batch.block_copies:
            self.backends[group].copy_blocks(self.kv_caches[group], [(source, destination)])
        parts = zip(self.backends, self.kv_caches, inputs.attention, strict=True)
        step = Step(groups=tuple(StepGroup(backend=b, kv_caches=c, plan=b.plan(m)) for b, c, m in parts))
        hidden_TE = self.model(inputs.token_ids_T, inputs.positions_T, step)
        samplers = [c for c in batch.chunks if c.sample_seed is not None]
        if not samplers:
            return []
        logits_RV = self.model.logits(hidden_TE[inputs.sample_rows_R])
        allowed_RV = None if bitmask is None else self._masked(logits_RV, bitmask.wait())
        return sample(logits_RV, SamplingBatch.of(samplers), allowed_RV)

    def _masked(self, logits_RV: torch.Tensor, bitmask: TokenBitmask) -> torch.Tensor:
        words = torch.from_numpy(bitmask.words_RW).to(self._device)
        if len(bitmask.rows_R) == len(logits_RV):
            return self._apply_token_bitmask(logits_RV, words)
        rows = torch.from_numpy(bitmask.rows_R).to(self._device)
        masked_RV = logits_RV.clone()
        masked_RV[rows] = self._apply_token_bitmask(logits_RV[rows], words)
        return masked_RV
