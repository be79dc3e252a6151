"""Decides how an engine will run, before anything is loaded: platform, settings, attention groups, sizes of the cache.

Platforms return data (Capabilities, Defaults); this module applies it. No config is changed, no memory is taken.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch

from fairlead import plugins
from fairlead.checkpoint import Checkpoint
from fairlead.config import CacheConfig, EngineConfig
from fairlead.contract import memory_info
from fairlead.engine.negotiation import (
    backend_reason,
    head_size_reasons,
    kv_dtype_of,
    make_backends,
    refusal,
    step_reasons,
)
from fairlead.errors import CheckpointError, ConfigError, KVCacheMemoryError, ModelMemoryError
from fairlead.interface import UNQUANTIZED, AttentionBackend, AttentionSpec, GraphRunner, Platform
from fairlead.layers.attention import Attention
from fairlead.layers.context import BuildContext
from fairlead.layers.self_attention import SelfAttention
from fairlead.models import loader, registry
from fairlead.models.config import ModelShape
from fairlead.ops.graph import PassThrough
from fairlead.ops.table import choose_providers
from fairlead.request import EngineInfo
from fairlead.scheduling.block_manager import CacheGroup, blocks_per_sequence

STORED_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")  # what a config.json may name


@dataclass(frozen=True, slots=True, kw_only=True)
class Negotiated:
    """The settings that an engine runs with: the user's, else the platform's, else the model's."""

    dtype: str
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    attention_backend: str
    kv_dtype: str
    device_memory_utilization: float
    async_scheduling: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """All that loading an engine needs to know. `backends` and `cache_groups` go by kind of attention layer."""

    checkpoint: Checkpoint
    model_config: Mapping[str, Any]
    shape: ModelShape
    platform: Platform
    settings: Negotiated
    context: BuildContext
    op_providers: dict[str, str]
    graph_runner: GraphRunner
    backends: tuple[AttentionBackend, ...]
    cache_groups: tuple[CacheGroup, ...]
    info: EngineInfo
    fuses_rotary: bool = False
    """Backends that can rotate queries and keys do."""

    def build_model(self) -> torch.nn.Module:
        """The model, its weights on the meta device, its attention layers numbered by group."""
        model = registry.build_model(self.checkpoint.architecture, self.model_config, self.shape, self.context)
        number_layers(model)
        if self.fuses_rotary:
            give_rotary(model, self.backends)
        return model


def plan_engine(config: EngineConfig) -> EnginePlan:
    """Settles everything about an engine, from the model's files alone.

    Raises ModelError, PluginError, ConfigError or KVCacheMemoryError; each says what to do.
    """
    checkpoint = Checkpoint.open(config.model)
    model_config = registry.read_config(checkpoint.architecture, checkpoint.config)
    shape = ModelShape.of(model_config)
    record, device = plugins.choose(config.platform)
    platform = plugins.create(record, device)
    settings, reasons = negotiate(config, checkpoint, shape, platform)
    graph_runner = platform.graph_runner()
    if config.platform.enforce_eager:
        if platform.capabilities.static_shapes:
            reasons.append("enforce_eager (it runs steps of its buckets' sizes alone)")
        else:
            graph_runner = PassThrough()
    reasons += step_reasons(platform, graph_runner, max_num_batched_tokens=settings.max_num_batched_tokens)
    try:
        context, op_providers = _context(config, platform, settings)
        # A model of one position tells its weights and layers, before anything as long as the context is made.
        model = registry.build_model(checkpoint.architecture, model_config, shape, context)
    except ConfigError as error:
        raise refusal(platform, [*reasons, str(error)]) from error
    weights_bytes = loader.weights_bytes(model)
    activation_bytes = least_activations(model, shape, settings)
    chosen = context.linear.chosen
    if chosen:
        op_providers["linear"] = ", ".join(dict.fromkeys(chain.from_iterable(chosen.values())))
    op_providers |= {op: ", ".join(names) for op, names in context.linear.fused.items() if op in op_providers}
    groups = number_layers(model)
    reasons += head_size_reasons(platform, groups)
    if config.model.quantization is not None and config.model.quantization not in chosen:
        reasons.append(f"quantization {config.model.quantization} (no layer of {checkpoint.architecture} can take it)")
    backends: tuple[AttentionBackend, ...] = ()
    if settings.attention_backend in (names := platform.attention_backends()):
        tried = names if config.platform.attention_backend is None else (settings.attention_backend,)
        backends, refused = make_backends(
            platform,
            tried,
            groups,
            block_size=settings.block_size,
            dtype=settings.dtype,
            kv_dtype=settings.kv_dtype,
        )
        reasons += refused
    if reasons:
        raise refusal(platform, reasons)
    fuses_rotary = not any(item.startswith("rotary_embedding=") for item in config.platform.op_providers)
    if fuses_rotary and (takers := give_rotary(model, backends)):
        op_providers["rotary_embedding"] = ", ".join(takers)
    _check_weights(weights_bytes, settings, platform)
    windows = [spec.sliding_window for spec in groups]
    block_bytes = [backend.block_bytes() for backend in backends]
    num_blocks = size_cache(
        config.cache, settings, platform, windows, block_bytes, weights_bytes, activation_bytes=activation_bytes
    )
    num_host_blocks = size_swap(config.cache, platform, num_blocks, block_bytes, weights_bytes)
    return EnginePlan(
        checkpoint=checkpoint,
        model_config=model_config,
        shape=shape,
        platform=platform,
        settings=settings,
        context=replace(context, max_model_len=settings.max_model_len),
        fuses_rotary=fuses_rotary,
        op_providers=op_providers,
        graph_runner=graph_runner,
        backends=backends,
        cache_groups=tuple(
            CacheGroup(num_blocks=n, sliding_window=window, num_host_blocks=num_host)
            for n, window, num_host in zip(num_blocks, windows, num_host_blocks, strict=True)
        ),
        info=EngineInfo(
            model=config.model.model,
            platform=platform.name,
            device=f"{device.name} ({device.description})",
            attention_backend=", ".join(dict.fromkeys(backend.name for backend in backends)),
            dtype=settings.dtype,
            vocab_size=shape.vocab_size,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            block_size=settings.block_size,
            num_blocks=max(num_blocks),
            weights_bytes=weights_bytes,
            kv_cache_bytes=sum(n * size for n, size in zip(num_blocks, block_bytes, strict=True)),
            activation_bytes=activation_bytes,
            swap_bytes=sum(n * size for n, size in zip(num_host_blocks, block_bytes, strict=True)),
        ),
    )


def resize_cache(plan: EnginePlan, config: CacheConfig, activation_bytes: int) -> EnginePlan:
    """The plan of a model that is loaded, with the KV cache that is left beside its measured activations.

    Raises KVCacheMemoryError.
    """
    windows = [group.sliding_window for group in plan.cache_groups]
    block_bytes = [backend.block_bytes() for backend in plan.backends]
    num_blocks = size_cache(
        config,
        plan.settings,
        plan.platform,
        windows,
        block_bytes,
        plan.info.weights_bytes,
        activation_bytes=activation_bytes,
        is_loaded=True,
    )
    info = replace(
        plan.info,
        num_blocks=max(num_blocks),
        kv_cache_bytes=sum(n * size for n, size in zip(num_blocks, block_bytes, strict=True)),
        activation_bytes=activation_bytes,
        activations_measured=True,
    )
    groups = tuple(replace(g, num_blocks=n) for g, n in zip(plan.cache_groups, num_blocks, strict=True))
    return replace(plan, cache_groups=groups, info=info)


def _context(config: EngineConfig, platform: Platform, settings: Negotiated) -> tuple[BuildContext, dict[str, str]]:
    """What a model of one position is built with, and the chosen op providers."""
    ops, linear, names = choose_providers(platform, dtype=settings.dtype, overrides=config.platform.op_providers)
    context = BuildContext(
        ops=ops,
        linear=linear,
        dtype=getattr(torch, settings.dtype),
        device=platform.torch_device,
        max_model_len=1,
        quantization=config.model.quantization or UNQUANTIZED,
    )
    return context, names


def number_layers(model: torch.nn.Module) -> dict[AttentionSpec, int]:
    """Sorts the attention layers into groups of one kind, tells each its place, and returns the groups' sizes."""
    sizes: dict[AttentionSpec, int] = {}
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.layer = sizes.setdefault(layer.spec, 0)
            layer.group = list(sizes).index(layer.spec)
            sizes[layer.spec] += 1
    return sizes


def give_rotary(model: torch.nn.Module, backends: Seq[AttentionBackend]) -> tuple[str, ...]:
    """Lets each layer's backend rotate its queries and keys, where it can; returns the names of those that do."""
    layers = [layer for layer in model.modules() if isinstance(layer, SelfAttention)]
    owners = [backends[layer.attention.group] for layer in layers]
    return tuple(dict.fromkeys(b.name for layer, b in zip(layers, owners, strict=True) if layer.give_rotary(b)))


def negotiate(
    config: EngineConfig, checkpoint: Checkpoint, shape: ModelShape, platform: Platform
) -> tuple[Negotiated, list[str]]:
    """Settles every open setting; returns with it all reasons why the platform cannot run them."""
    capabilities, defaults = platform.capabilities, platform.defaults
    reasons: list[str] = []
    dtype = config.model.dtype
    if dtype == "auto":
        stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
        if stored not in STORED_DTYPES:
            known = ", ".join(STORED_DTYPES)
            raise CheckpointError(f"config.json: dtype {stored!r:.60} is none of {known}; give another with --dtype")
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
    names = platform.attention_backends()
    wanted = config.platform.attention_backend or names[0]
    backend = next((name for name in names if name.lower() == wanted.lower()), None)
    if backend is None:
        reasons.append(backend_reason(platform, wanted))
    kv_dtype = kv_dtype_of(platform, config.cache.kv_cache_dtype)
    if kv_dtype is None:
        reasons.append(f"kv_cache_dtype {config.cache.kv_cache_dtype} (it has {', '.join(capabilities.kv_dtypes)})")
    is_async = config.scheduler.async_scheduling
    if config.cache.swap_space > 0 and platform.max_swap_bytes(0) is None:
        reasons.append(f"swap_space {config.cache.swap_space} (it cannot copy KV blocks to host memory)")
    settings = Negotiated(
        dtype=dtype,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=min(config.scheduler.max_num_seqs, capabilities.max_num_seqs or config.scheduler.max_num_seqs),
        max_num_batched_tokens=max_batched,
        attention_backend=backend or wanted,
        kv_dtype=kv_dtype or "auto",
        device_memory_utilization=config.cache.device_memory_utilization or defaults.device_memory_utilization,
        async_scheduling=defaults.async_scheduling if is_async is None else is_async,
    )
    return settings, reasons


def least_activations(model: torch.nn.Module, shape: ModelShape, settings: Negotiated) -> int:
    """Bytes that the largest step takes at least: the widest layer's input and output, the residual stream twice, and
    the logits with one copy of them."""
    sizes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    widest = max((sum(size) for size in sizes if shape.vocab_size not in size), default=0)
    num_tokens = settings.max_num_batched_tokens
    item_bytes: int = getattr(torch, settings.dtype).itemsize
    num_rows = min(settings.max_num_seqs, num_tokens)
    return num_tokens * (2 * shape.hidden_size + widest) * item_bytes + 2 * num_rows * shape.vocab_size * 4


def _check_weights(weights_bytes: int, settings: Negotiated, platform: Platform) -> None:
    """Raises ModelMemoryError if the weights alone are more than what is free."""
    memory = memory_info(platform)
    if weights_bytes > memory.free_bytes:
        needed, free, total = (n / 2**30 for n in (weights_bytes, memory.free_bytes, memory.total_bytes))
        raise ModelMemoryError(
            f"the weights need {needed:.2f} GiB in {settings.dtype}, but platform {platform.name!r} has {free:.2f} GiB "
            f"free of {total:.2f}; take a smaller model or --dtype, or end what holds the memory"
        )


def size_cache(
    config: CacheConfig,
    settings: Negotiated,
    platform: Platform,
    windows: Seq[int | None],
    block_bytes: Seq[int],
    weights_bytes: int,
    *,
    activation_bytes: int = 0,
    is_loaded: bool = False,
) -> tuple[int, ...]:
    """Number of KV blocks of each group: what was asked for, else what the memory share leaves.

    The groups are sized so that all of them hold the same number of sequences of max_model_len, and no group gets more
    than max_num_seqs of them can ever use. Unless `is_loaded`, the weights will still take their part of what is free.
    Raises KVCacheMemoryError if not even one sequence fits, or if more was asked for than the device has.
    """
    memory = memory_info(platform)
    chunk = settings.max_num_batched_tokens
    per_sequence = [blocks_per_sequence(w, settings.max_model_len, settings.block_size, chunk) for w in windows]
    sequence_bytes = sum(n * size for n, size in zip(per_sequence, block_bytes, strict=True))
    most = max(per_sequence)
    if config.num_blocks is not None:
        num_blocks = config.num_blocks
    elif config.kv_cache_memory is not None:
        num_blocks = config.kv_cache_memory * most // sequence_bytes
    else:
        share = int(memory.total_bytes * settings.device_memory_utilization) - weights_bytes
        free = memory.free_bytes - (0 if is_loaded else weights_bytes)
        num_blocks = max(min(share, free) - activation_bytes, 0) * most // sequence_bytes
        num_blocks = min(num_blocks, most * settings.max_num_seqs)
    cache_mib = num_blocks * sequence_bytes / most / 2**20
    if cache_mib > memory.total_bytes / 2**20:
        raise KVCacheMemoryError(
            f"{num_blocks} KV blocks need {cache_mib:.1f} MiB, but the device has "
            f"{memory.total_bytes / 2**20:.1f} MiB in all; ask for a smaller KV cache"
        )
    if num_blocks < most:
        remedy = "give the cache more memory (--device-memory-utilization, --kv-cache-memory)"
        if num_blocks * settings.block_size >= 2:
            remedy = f"set --max-model-len to at most {num_blocks * settings.block_size}, or {remedy}"
        raise KVCacheMemoryError(
            f"one sequence of max_model_len {settings.max_model_len} needs {most} KV blocks "
            f"({sequence_bytes / 2**20:.1f} MiB), but there are {num_blocks} ({cache_mib:.1f} MiB); {remedy}"
        )
    return tuple(num_blocks * n // most for n in per_sequence)


def size_swap(
    config: CacheConfig, platform: Platform, num_blocks: Seq[int], block_bytes: Seq[int], weights_bytes: int
) -> tuple[int, ...]:
    """Number of host blocks of each group, in the proportions of the KV cache; none without swap space.

    The weights are still to be loaded. Raises KVCacheMemoryError if the host has less memory than was asked for, or
    if that holds no block of some group.
    """
    if config.swap_space == 0:
        return (0,) * len(num_blocks)
    cache_bytes = sum(n * size for n, size in zip(num_blocks, block_bytes, strict=True))
    available_bytes = platform.max_swap_bytes(weights_bytes + cache_bytes)
    assert available_bytes is not None
    swap_bytes = int(config.swap_space * 2**30)
    if swap_bytes > available_bytes:
        raise KVCacheMemoryError(
            f"swap_space {config.swap_space} needs {config.swap_space:.2f} GiB of host memory, but beside model and "
            f"KV cache {available_bytes / 2**30:.2f} GiB are available; set --swap-space to less"
        )
    num_host_blocks = tuple(swap_bytes * n // cache_bytes for n in num_blocks)
    if min(num_host_blocks) == 0:
        least_bytes = -(-cache_bytes // min(num_blocks))
        raise KVCacheMemoryError(
            f"swap_space {config.swap_space} ({swap_bytes} bytes) does not hold one KV block of every kind of layer; "
            f"set --swap-space to at least {least_bytes / 2**30:.9f}, or to 0"
        )
    return num_host_blocks
