"""Builds an engine's parts from a config: negotiates, loads, sizes the KV cache. Nothing is allocated before all fits.

Platforms return data (Capabilities, Defaults); this module applies it. No config is changed.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from fairlead import plugins
from fairlead.checkpoint import Checkpoint
from fairlead.config import CacheConfig, EngineConfig
from fairlead.engine.model_runner import ModelRunner
from fairlead.errors import ConfigError, KVCacheMemoryError
from fairlead.interface import AttentionShape, Platform
from fairlead.layers.context import BuildContext
from fairlead.models import loader, registry
from fairlead.models.config import ModelShape
from fairlead.ops.table import choose_ops
from fairlead.request import EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Negotiated:
    """The settings that an engine runs with: the user's, else the platform's, else the model's."""

    dtype: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    attention_backend: str
    device_memory_utilization: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """A loaded model with its cache, ready for steps."""

    runner: ModelRunner
    info: EngineInfo
    settings: Negotiated
    checkpoint: Checkpoint
    op_providers: dict[str, str]


def build(config: EngineConfig) -> BuiltEngine:
    """Loads the model of a config onto its platform.

    Raises ModelError, PluginError, ConfigError or KVCacheMemoryError; each says what to do.
    """
    checkpoint = Checkpoint.open(config.model)
    registry.check_supported(checkpoint.architecture)
    shape = ModelShape.of(checkpoint.config)
    record, device = plugins.choose(config.platform)
    platform = plugins.create(record, device)
    settings = negotiate(config, checkpoint, shape, platform)
    ops, op_providers = choose_ops(
        platform.name, platform.ops(), dtype=settings.dtype, overrides=config.platform.op_providers
    )
    backend = platform.attention(
        settings.attention_backend,
        AttentionShape(
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            block_size=settings.block_size,
            scale=shape.head_size**-0.5,
            dtype=settings.dtype,
        ),
    )
    context = BuildContext(ops=ops, dtype=getattr(torch, settings.dtype), device=platform.torch_device, max_model_len=1)
    # A model of one position tells what the weights take, before anything as long as the context is made.
    model = registry.build_model(checkpoint.architecture, checkpoint.config, shape, context)
    weights_bytes = sum(p.nbytes for p in model.parameters())
    num_blocks = size_cache(config.cache, settings, platform, backend.block_bytes(), weights_bytes)
    context = replace(context, max_model_len=settings.max_model_len)
    model = registry.build_model(checkpoint.architecture, checkpoint.config, shape, context)
    if config.model.load_format == "dummy":
        loader.dummy_weights(model, platform.allocator, seed=config.model.seed)
    else:
        loader.load_weights(model, checkpoint, platform.allocator)
    runner = ModelRunner(model, backend, block_size=settings.block_size, device=platform.torch_device)
    runner.allocate_cache(num_blocks)
    info = EngineInfo(
        model=config.model.served_model_name or config.model.model,
        platform=platform.name,
        device=f"{device.name} ({device.description})",
        attention_backend=settings.attention_backend,
        dtype=settings.dtype,
        vocab_size=shape.vocab_size,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        block_size=settings.block_size,
        num_blocks=num_blocks,
        weights_bytes=weights_bytes,
        kv_cache_bytes=num_blocks * backend.block_bytes(),
    )
    return BuiltEngine(runner=runner, info=info, settings=settings, checkpoint=checkpoint, op_providers=op_providers)


def negotiate(config: EngineConfig, checkpoint: Checkpoint, shape: ModelShape, platform: Platform) -> Negotiated:
    """Settles every open setting, or raises one ConfigError that lists all reasons why it cannot be."""
    capabilities, defaults = platform.capabilities, platform.defaults
    reasons: list[str] = []
    dtype = config.model.dtype
    if dtype == "auto":
        stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
        dtype = stored if stored in capabilities.dtypes else defaults.dtype
    if dtype not in capabilities.dtypes:
        reasons.append(f"dtype {dtype} (it has {', '.join(capabilities.dtypes)})")
    block_size = config.cache.block_size or defaults.block_size
    if block_size not in capabilities.block_sizes:
        reasons.append(f"block_size {block_size} (it has {', '.join(map(str, sorted(capabilities.block_sizes)))})")
    if capabilities.head_sizes and shape.head_size not in capabilities.head_sizes:
        reasons.append(f"head size {shape.head_size} (it has {', '.join(map(str, capabilities.head_sizes))})")
    max_model_len = config.model.max_model_len or shape.max_positions
    if max_model_len > shape.max_positions:
        reasons.append(f"max_model_len {max_model_len} (the model was made for {shape.max_positions})")
    max_batched = config.scheduler.max_num_batched_tokens or defaults.max_num_batched_tokens
    if capabilities.max_batched_tokens is not None and max_batched > capabilities.max_batched_tokens:
        reasons.append(f"max_num_batched_tokens {max_batched} (at most {capabilities.max_batched_tokens})")
    backend = _backend(config.platform.attention_backend, platform.attention_backends())
    if backend is None:
        names = ", ".join(platform.attention_backends())
        reasons.append(f"attention_backend {config.platform.attention_backend} (it has {names})")
    if reasons or backend is None:
        raise ConfigError(f"platform {platform.name!r} cannot run this model so: {'; '.join(reasons)}")
    return Negotiated(
        dtype=dtype,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=max_batched,
        attention_backend=backend,
        device_memory_utilization=config.cache.device_memory_utilization or defaults.device_memory_utilization,
    )


def _backend(wanted: str | None, names: Seq[str]) -> str | None:
    if wanted is None:
        return names[0]
    return next((n for n in names if n.lower() == wanted.lower()), None)


def size_cache(
    config: CacheConfig, settings: Negotiated, platform: Platform, block_bytes: int, weights_bytes: int
) -> int:
    """Number of KV blocks: what was asked for, else what the memory share leaves, but no more than can ever be used.

    The weights are still to be loaded. Raises KVCacheMemoryError if one sequence of max_model_len does not fit, or if
    more was asked for than the device has.
    """
    memory = platform.memory_info()
    blocks_per_seq = -(-settings.max_model_len // settings.block_size)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory // block_bytes
    else:
        share = int(memory.total_bytes * settings.device_memory_utilization) - weights_bytes
        num_blocks = max(min(share, memory.free_bytes - weights_bytes), 0) // block_bytes
        num_blocks = min(num_blocks, blocks_per_seq * settings.max_num_seqs)
    if num_blocks * block_bytes > memory.total_bytes:
        raise KVCacheMemoryError(
            f"{num_blocks} KV blocks need {num_blocks * block_bytes / 2**20:.1f} MiB, but the device has "
            f"{memory.total_bytes / 2**20:.1f} MiB in all; ask for a smaller KV cache"
        )
    if num_blocks < blocks_per_seq:
        needed, available = blocks_per_seq * block_bytes, num_blocks * block_bytes
        remedy = "give the cache more memory (--device-memory-utilization, --kv-cache-memory)"
        if num_blocks * settings.block_size >= 2:
            remedy = f"set --max-model-len to at most {num_blocks * settings.block_size}, or {remedy}"
        raise KVCacheMemoryError(
            f"one sequence of max_model_len {settings.max_model_len} needs {blocks_per_seq} KV blocks "
            f"({needed / 2**20:.1f} MiB), but there are {num_blocks} ({available / 2**20:.1f} MiB); {remedy}"
        )
    return num_blocks
