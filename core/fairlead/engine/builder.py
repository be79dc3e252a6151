"""Carries out an EnginePlan: loads the weights, allocates the cache."""

from dataclasses import dataclass

from fairlead.config import EngineConfig
from fairlead.engine.first_step import check_first_step, warm_up
from fairlead.engine.model_runner import ModelRunner
from fairlead.engine.planner import EnginePlan, plan_engine
from fairlead.models import loader


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """A loaded model with its cache, ready for steps."""

    plan: EnginePlan
    runner: ModelRunner


def build(config: EngineConfig) -> BuiltEngine:
    """Loads the model of a config onto its platform.

    Raises what `plan_engine` raises, ModelError where a file turns out broken, and PluginContractError where the first
    step shows that the platform breaks its contract; each says what to do.
    """
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
        graph_runner=found.graph_runner,
    )
    runner.allocate_cache([1] * len(found.backends))
    check_first_step(runner, plugin=found.platform.name, vocab_size=found.shape.vocab_size)
    runner.allocate_cache([group.num_blocks for group in found.cache_groups])
    warm_up(runner)
    return BuiltEngine(plan=found, runner=runner)
