"""What `fairlead.testing.null` creates. Shapes: see there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fairlead.errors import ConfigError
from fairlead.interface import (
    TAGS,
    AttentionBackend,
    AttentionMetadata,
    AttentionShape,
    Capabilities,
    Defaults,
    HostCache,
    KVCache,
    MemoryAllocator,
    MemoryInfo,
    MoeSpec,
    OpProvider,
)
from fairlead.ops.platform import BasicPlatform

Tensor = torch.Tensor


class NullAttention:
    """Stores nothing and attends to nothing; a block still has a size, so that the cache is planned as on a device."""

    name = "null"

    def __init__(self, shape: AttentionShape, allocator: MemoryAllocator) -> None:
        self.shape, self._allocator = shape, allocator

    def block_bytes(self) -> int:
        """Of all layers: one byte per token of each."""
        return self.shape.num_layers * self.shape.block_size

    def allocate(self, num_blocks: int) -> list[KVCache]:
        """One tensor per layer."""
        size = num_blocks * self.shape.block_size
        return [self._allocator.empty((size,), torch.uint8, tag="kv_cache") for _ in range(self.shape.num_layers)]

    def plan(self, metadata: AttentionMetadata) -> object:
        """Nothing to plan."""
        return None

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor | None, kv_cache: KVCache, plan: object) -> Tensor:
        """Zeros."""
        return q_THD.new_zeros((*q_THD.shape[:2], self.shape.spec.value_size or self.shape.spec.head_size))

    def copy_blocks(self, kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]) -> None:
        """Nothing to copy."""

    def allocate_host(self, num_blocks: int) -> list[HostCache]:
        """Nothing to keep."""
        return [None] * self.shape.num_layers

    def copy_to_host(
        self, kv_caches: Sequence[KVCache], host_caches: Sequence[HostCache], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Nothing to copy."""

    def copy_from_host(
        self, host_caches: Sequence[HostCache], kv_caches: Sequence[KVCache], pairs: Sequence[tuple[int, int]]
    ) -> None:
        """Nothing to copy."""


def _embedding(token_ids_T: Tensor, weight_VE: Tensor) -> Tensor:
    return weight_VE.new_zeros((len(token_ids_T), weight_VE.shape[1]))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_zeros((len(x), len(weight)))


def _norm(x_NE: Tensor, *weights: object) -> Tensor:
    return torch.zeros_like(x_NE, memory_format=torch.contiguous_format)


def _fused_add_rms_norm(x_NE: Tensor, residual_NE: Tensor, weight_E: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm(x_NE), _norm(x_NE)


def _rotary_embedding(
    q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _norm(q), _norm(k)


def _gated(x_N2F: Tensor) -> Tensor:
    return x_N2F.new_zeros((len(x_N2F), x_N2F.shape[1] // 2))


def _moe(
    x_TE: Tensor, logits: Tensor, correction: Tensor | None, gate_up: Tensor, down: Tensor, spec: MoeSpec
) -> Tensor:
    return _norm(x_TE)


def _lora_shrink(x_NI: Tensor, a_LRI: Tensor, adapter_N: Tensor) -> Tensor:
    return x_NI.new_zeros((len(x_NI), a_LRI.shape[1]), dtype=torch.float32)


def _lora_expand(y_NO: Tensor, h_NR: Tensor, b_LOR: Tensor, adapter_N: Tensor) -> Tensor:
    return _norm(y_NO)


_OPS: dict[str, Callable[..., Any]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _norm,
    "fused_add_rms_norm": _fused_add_rms_norm,
    "gemma_rms_norm": _norm,
    "layer_norm": _norm,
    "rotary_embedding": _rotary_embedding,
    "silu_and_mul": _gated,
    "gelu_and_mul": _gated,
    "moe": _moe,
    "lora_shrink": _lora_shrink,
    "lora_expand": _lora_expand,
}


class NullPlatform(BasicPlatform):
    """Every dtype, head size and kind of layer; results without meaning."""

    name = "null"
    torch_device = torch.device("cpu")
    capabilities = Capabilities(dtypes=("float32", "bfloat16"), block_sizes=(16, 1, 8, 32, 128), computes=False)
    defaults = Defaults(dtype="float32", block_size=16, max_num_batched_tokens=2048, device_memory_utilization=0.5)

    def attention_backends(self) -> tuple[str, ...]:
        """One, that does nothing."""
        return (NullAttention.name,)

    def attention(self, name: str, shape: AttentionShape) -> AttentionBackend:
        """Makes it."""
        if name != NullAttention.name:
            raise ConfigError(f"the null platform has no attention backend {name!r}; it has: {NullAttention.name}")
        return NullAttention(shape, self.allocator)

    def ops(self) -> Mapping[str, tuple[OpProvider, ...]]:
        """All that a model calls; what sampling calls is computed, since it says what comes out."""
        return {op: (OpProvider(name="null", fn=fn),) for op, fn in _OPS.items()}

    def memory_info(self) -> MemoryInfo:
        """What the device said, less what was handed out."""
        total = self.device.memory_bytes
        return MemoryInfo(total_bytes=total, free_bytes=total - sum(map(self.allocator.allocated_bytes, TAGS)))
