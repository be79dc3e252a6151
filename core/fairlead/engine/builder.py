"""Carries out an EnginePlan: loads the weights, allocates the cache."""

import logging
from dataclasses import dataclass, replace

from fairlead.config import EngineConfig
from fairlead.engine import swap_costs
from fairlead.engine.first_step import check_first_step, reachable_buckets, warm_up
from fairlead.engine.memory_profile import measure_activations
from fairlead.engine.model_runner import ModelRunner
from fairlead.engine.planner import EnginePlan, plan_engine, resize_cache
from fairlead.errors import ModelMemoryError
from fairlead.models import loader
from fairlead.scheduling.host_tier import SwapCosts

logger = logging.getLogger("fairlead.engine")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """A loaded model with its cache, ready for steps. Without `swap_costs` no block is swapped."""

    plan: EnginePlan
    runner: ModelRunner
    swap_costs: SwapCosts | None = None


def build(config: EngineConfig) -> BuiltEngine:
    """Loads the model of a config onto its platform.

    Raises what `plan_engine` raises, ModelError where a file turns out broken or memory runs out, and
    PluginContractError where the first step shows that the platform breaks its contract; each says what to do.
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
        ops=found.context.ops,
        graph_runner=found.graph_runner,
    )
    runner.allocate_cache([1] * len(found.backends))
    check_first_step(runner, plugin=found.platform.name, vocab_size=found.shape.vocab_size)
    if config.cache.num_blocks is None and config.cache.kv_cache_memory is None:
        activation_bytes = measure_activations(found, runner)
        if activation_bytes is not None:
            found = resize_cache(found, config.cache, activation_bytes)
    runner.allocate_cache([group.num_blocks for group in found.cache_groups])
    warm_up(runner, reachable_buckets(found.graph_runner, found.settings))
    return _with_swap(BuiltEngine(plan=found, runner=runner))


def _with_swap(built: BuiltEngine) -> BuiltEngine:
    """Gives the engine its host blocks, where there is swap space and it can ever save time."""
    plan, runner = built.plan, built.runner
    num_host_blocks = [group.num_host_blocks for group in plan.cache_groups]
    if not any(num_host_blocks):
        return built
    runner.allocate_host_cache(num_host_blocks)
    costs = swap_costs.measure(plan, runner)
    text = swap_costs.describe(costs, plan.settings.block_size)
    pays = costs.ever_pays(plan.settings.block_size)
    if not pays:
        text += "; swap_space is not used, since that never pays"
        runner.free_host_cache()
    logger.info("swap space: %s", text)
    info = replace(plan.info, swap_bytes=plan.info.swap_bytes if pays else 0, swap_costs=text)
    return BuiltEngine(plan=replace(plan, info=info), runner=runner, swap_costs=costs if pays else None)
