"""Carries out an EnginePlan: loads the weights, allocates the cache."""

from dataclasses import dataclass

from fairlead.config import EngineConfig
from fairlead.engine.memory_profile import measure_activations
from fairlead.engine.model_runner import ModelRunner
from fairlead.engine.planner import EnginePlan, plan_engine, resize_cache
from fairlead.errors import ModelMemoryError
from fairlead.models import loader


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """A loaded model with its cache, ready for steps."""

    plan: EnginePlan
    runner: ModelRunner


def build(config: EngineConfig) -> BuiltEngine:
    """Loads the model of a config onto its platform.

    Raises what `plan_engine` raises, and ModelError where a file turns out broken or memory runs out; each says what
    to do.
    """
    try:
        return _build(config)
    except MemoryError as error:
        why = " ".join(str(error).split()) or "an allocation failed"
        raise ModelMemoryError(
            f"memory ran out while {config.model.model!r} was loaded: {why}; take a smaller model, --dtype or KV cache "
            "(--kv-cache-memory, --max-model-len), or end what holds the memory"
        ) from error


def _build(config: EngineConfig) -> BuiltEngine:
    found = plan_engine(config)
    model = found.build_model()
    if config.model.load_format == "dummy":
        loader.dummy_weights(model, found.platform.allocator, seed=config.model.seed)
    else:
        loader.load_weights(model, found.checkpoint, found.platform.allocator)
    runner = ModelRunner(
        model,
        found.backends,
        block_size=found.settings.block_size,
        device=found.platform.torch_device,
        apply_token_bitmask=found.context.ops.apply_token_bitmask,
    )
    if config.cache.num_blocks is None and config.cache.kv_cache_memory is None:
        activation_bytes = measure_activations(found, runner)
        if activation_bytes is not None:
            found = resize_cache(found, config.cache, activation_bytes)
    runner.allocate_cache([group.num_blocks for group in found.cache_groups])
    return BuiltEngine(plan=found, runner=runner)
