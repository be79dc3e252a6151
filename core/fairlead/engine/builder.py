"""Builds an engine's parts from a config: negotiates, loads, sizes the KV cache. Nothing is allocated before all fits.

Platforms return data (Capabilities, Defaults); this module applies it. No config is changed.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from fairlead import plugins
from fairlead.checkpoint import Checkpoint
from fairlead.config import CacheConfig, EngineConfig
from fairlead.engine.model_runner import ModelRunner
from fairlead.errors import ConfigError, KVCacheMemoryError
from fairlead.interface import AttentionShape, AttentionSpec, Platform
from fairlead.layers.attention import Attention
from fairlead.layers.context import BuildContext
from fairlead.models import loader, registry
from fairlead.models.config import ModelShape
from fairlead.ops.table import choose_ops
from fairlead.request import EngineInfo
from fairlead.scheduling.block_manager import CacheGroup, blocks_per_sequence


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
    cache_groups: tuple[CacheGroup, ...]
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
    settings, reasons = negotiate(config, checkpoint, shape, platform)
    ops, op_providers = choose_ops(
        platform.name, platform.ops(), dtype=settings.dtype, overrides=config.platform.op_providers
    )
    context = BuildContext(
        ops=ops,
        dtype=getattr(torch, settings.dtype),
        device=platform.torch_device,
        max_model_len=settings.max_model_len,
    )
    model = registry.build_model(checkpoint.architecture, checkpoint.config, shape, context)
    groups = number_layers(model)
    reasons += _head_size_reasons(groups, platform.capabilities.head_sizes)
    if reasons:
        raise ConfigError(f"platform {platform.name!r} cannot run this model so: {'; '.join(reasons)}")
    backends = [
        platform.attention(
            settings.attention_backend,
            AttentionShape(spec=spec, num_layers=n, block_size=settings.block_size, dtype=settings.dtype),
        )
        for spec, n in groups.items()
    ]
    if config.model.load_format == "dummy":
        weights_bytes = loader.dummy_weights(model, platform.allocator, seed=config.model.seed)
    else:
        weights_bytes = loader.load_weights(model, checkpoint, platform.allocator)
    windows = [spec.sliding_window for spec in groups]
    block_bytes = [backend.block_bytes() for backend in backends]
    num_blocks = size_cache(config.cache, settings, platform, windows, block_bytes, weights_bytes)
    runner = ModelRunner(
        model,
        backends,
        block_size=settings.block_size,
        device=platform.torch_device,
        apply_token_bitmask=ops.apply_token_bitmask,
    )
    runner.allocate_cache(num_blocks)
    cache_groups = tuple(
        CacheGroup(num_blocks=n, sliding_window=window) for n, window in zip(num_blocks, windows, strict=True)
    )
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
        num_blocks=max(num_blocks),
        weights_bytes=weights_bytes,
        kv_cache_bytes=sum(n * size for n, size in zip(num_blocks, block_bytes, strict=True)),
    )
    return BuiltEngine(
        runner=runner,
        info=info,
        settings=settings,
        cache_groups=cache_groups,
        checkpoint=checkpoint,
        op_providers=op_providers,
    )


def number_layers(model: torch.nn.Module) -> dict[AttentionSpec, int]:
    """Sorts the attention layers into groups of one kind, tells each its place, and returns the groups' sizes."""
    sizes: dict[AttentionSpec, int] = {}
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.layer = sizes.setdefault(layer.spec, 0)
            layer.group = list(sizes).index(layer.spec)
            sizes[layer.spec] += 1
    return sizes


def negotiate(
    config: EngineConfig, checkpoint: Checkpoint, shape: ModelShape, platform: Platform
) -> tuple[Negotiated, list[str]]:
    """Settles every open setting; returns all reasons why the platform cannot run them, too."""
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
    settings = Negotiated(
        dtype=dtype,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=max_batched,
        attention_backend=backend or "",
        device_memory_utilization=config.cache.device_memory_utilization or defaults.device_memory_utilization,
    )
    return settings, reasons


def _head_size_reasons(groups: Iterable[AttentionSpec], head_sizes: Seq[int]) -> list[str]:
    missing = {spec.head_size for spec in groups} - set(head_sizes) if head_sizes else set()
    return [f"head size {size} (it has {', '.join(map(str, head_sizes))})" for size in sorted(missing)]


def _backend(wanted: str | None, names: Seq[str]) -> str | None:
    if wanted is None:
        return names[0]
    return next((n for n in names if n.lower() == wanted.lower()), None)


def size_cache(
    config: CacheConfig,
    settings: Negotiated,
    platform: Platform,
    windows: Seq[int | None],
    block_bytes: Seq[int],
    weights_bytes: int,
) -> tuple[int, ...]:
    """Number of KV blocks of each group: what was asked for, else what the memory share leaves.

    The groups are sized so that all of them hold the same number of sequences of max_model_len, and no group gets more
    than max_num_seqs of them can ever use. Raises KVCacheMemoryError if not even one fits.
    """
    chunk = settings.max_num_batched_tokens
    per_sequence = [blocks_per_sequence(w, settings.max_model_len, settings.block_size, chunk) for w in windows]
    sequence_bytes = sum(n * size for n, size in zip(per_sequence, block_bytes, strict=True))
    most = max(per_sequence)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
        available = num_blocks * sequence_bytes // most
    else:
        available = config.kv_cache_memory or _memory_share(settings, platform, weights_bytes)
        num_blocks = min(available * most // sequence_bytes, most * settings.max_num_seqs)
    if num_blocks < most:
        fits = num_blocks * settings.block_size
        remedy = "give the cache more memory (--device-memory-utilization, --kv-cache-memory)"
        if fits >= 2:
            remedy = f"set --max-model-len to at most {fits}, or {remedy}"
        raise KVCacheMemoryError(
            f"one sequence of max_model_len {settings.max_model_len} needs {sequence_bytes / 2**20:.1f} MiB of KV "
            f"cache ({most} blocks), but there are {available / 2**20:.1f} MiB ({num_blocks} blocks); {remedy}"
        )
    return tuple(-(-num_blocks * n // most) for n in per_sequence)


def _memory_share(settings: Negotiated, platform: Platform, weights_bytes: int) -> int:
    memory = platform.memory_info()
    share = int(memory.total_bytes * settings.device_memory_utilization) - weights_bytes
    return max(min(share, memory.free_bytes), 0)
