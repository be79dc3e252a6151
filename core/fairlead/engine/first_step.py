"""The first steps of an engine, before anybody waits for it: what the platform gives is checked, and its graph runner
gets to know every size.

They are made of padding alone (see `batch_builder.Padding`), so nothing in the cache is touched that anybody will read.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch

from fairlead.engine.batch_builder import ModelInput, Padding, build_input
from fairlead.engine.model_runner import ModelRunner
from fairlead.engine.planner import Negotiated
from fairlead.interface import AttentionBackend, AttentionSpec, GraphRunner, KVCache, RotaryAttention
from fairlead.layers.attention import Attention
from fairlead.layers.context import Step, StepGroup
from fairlead.ops.first_call import check_result, unwrap
from fairlead.scheduling.batch import ScheduledBatch

_NOTHING = ScheduledBatch(chunks=(), block_copies=())


@torch.inference_mode()
def check_first_step(runner: ModelRunner, *, plugin: str, vocab_size: int) -> None:
    """Runs one small step with every result of the platform checked; not by the graph runner, since its cache goes.

    Raises PluginContractError naming plugin, hook, expected and got.
    """
    model = cast(torch.nn.Module, runner.model)
    specs = {layer.group: layer.spec for layer in model.modules() if isinstance(layer, Attention)}
    backends = tuple(
        cast(AttentionBackend, _CheckedAttention(backend, specs[group], plugin=plugin))
        for group, backend in enumerate(runner.backends)
    )
    size = min(runner.padded.buckets, default=1)
    inputs, step = _padding_step(runner, size, backends)
    hidden_TE = runner.model(inputs.token_ids_T, inputs.positions_T, step)
    logits = runner.padded.logits(hidden_TE)
    expected = torch.empty((len(hidden_TE), vocab_size), dtype=torch.float32, device="meta")
    check_result(logits, expected, hidden_TE.device, plugin=plugin, hook="the ops and linear methods of the head")
    unwrap(model)


def reachable_buckets(graph_runner: GraphRunner, settings: Negotiated) -> list[int]:
    """Those to which a step, or its rows of logits, can be padded; capturing the others would be time and memory lost.

    A step of decodes alone has as many rows as sequences run, a mixed one as many as a step may have tokens.
    """
    decodes = range(1, settings.max_num_seqs + 1) if graph_runner.buckets else ()
    mixed = range(2, settings.max_num_batched_tokens + 1) if graph_runner.buckets else ()
    found = {graph_runner.bucket(n, 1) for n in decodes} | {graph_runner.bucket(n, n) for n in mixed}
    return sorted(size for size in found if size is not None)


@torch.inference_mode()
def warm_up(runner: ModelRunner, sizes: Sequence[int]) -> None:
    """Runs these buckets once, the largest first: the memory of its capture then serves all smaller ones."""
    for size in sorted(sizes, reverse=True):
        inputs, step = _padding_step(runner, size, runner.backends)
        runner.padded.logits(runner.padded.hidden(inputs.token_ids_T, inputs.positions_T, step))


def _padding_step(
    runner: ModelRunner, num_tokens: int, backends: tuple[AttentionBackend, ...]
) -> tuple[ModelInput, Step]:
    padding = Padding(num_tokens=num_tokens, blocks=runner.padding_blocks)
    inputs = build_input(_NOTHING, runner.block_size, runner.device, padding)
    plans = [backend.plan(metadata) for backend, metadata in zip(runner.backends, inputs.attention, strict=True)]
    parts = zip(backends, runner.kv_caches, plans, strict=True)
    groups = tuple(StepGroup(backend=backend, kv_caches=caches, plan=plan) for backend, caches, plan in parts)
    return inputs, Step(groups=groups)


class _CheckedAttention:
    """An AttentionBackend's `forward` and `forward_rotary`, their results checked."""

    def __init__(self, backend: AttentionBackend, spec: AttentionSpec, *, plugin: str) -> None:
        self._backend, self._plugin = backend, plugin
        self._value_size = spec.value_size or spec.head_size

    def forward(
        self, q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor | None, kv_cache: KVCache, plan: object
    ) -> torch.Tensor:
        """The backend's own."""
        return self._checked(q_THD, self._backend.forward(q_THD, k_TKD, v_TKD, kv_cache, plan), "forward")

    def forward_rotary(self, q_THD: torch.Tensor, *rest: Any) -> torch.Tensor:
        """The backend's own, if it is a RotaryAttention."""
        out = cast(RotaryAttention, self._backend).forward_rotary(q_THD, *rest)
        return self._checked(q_THD, out, "forward_rotary")

    def _checked(self, q_THD: torch.Tensor, out: torch.Tensor, method: str) -> torch.Tensor:
        expected = torch.empty((*q_THD.shape[:2], self._value_size), dtype=q_THD.dtype, device="meta")
        hook = f"attention({self._backend.name!r}).{method}"
        check_result(out, expected, q_THD.device, plugin=self._plugin, hook=hook)
        return out
