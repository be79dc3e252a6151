"""Which implementation of each op runs: chosen once, when a model is built, never per call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType

import torch

from fairlead.errors import ConfigError, PluginContractError
from fairlead.interface import MoeSpec, OpProvider, Platform
from fairlead.ops import reference
from fairlead.ops.first_call import FirstCall
from fairlead.ops.linear import LinearTable

Tensor = torch.Tensor

REFERENCE = "reference"

TOLERANCE: dict[str, float] = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}
"""Largest error of a provider against the float32 reference, absolute plus relative, by dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """The chosen implementations; signatures and meaning are those of `fairlead.ops.reference`."""

    embedding: Callable[[Tensor, Tensor], Tensor]
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    fused_add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    gemma_rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor | None, float], Tensor]
    rotary_embedding: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    silu_and_mul: Callable[[Tensor], Tensor]
    gelu_and_mul: Callable[[Tensor], Tensor]
    moe: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, MoeSpec], Tensor]
    lora_shrink: Callable[[Tensor, Tensor, Tensor], Tensor]
    lora_expand: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    apply_token_bitmask: Callable[[Tensor, Tensor], Tensor]
    apply_penalties: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    draw: Callable[[Tensor, Tensor], Tensor]
    draw_filtered: Callable[[Tensor, Tensor, int], Tensor]


OP_NAMES = tuple(f.name for f in fields(Ops))

# Which expert a token goes to, and how many tokens a row keeps, depends on values, which the meta device has not.
_REFERENCES_ON_META: dict[str, Callable[..., object]] = {
    **{name: getattr(reference, name) for name in OP_NAMES},
    "moe": lambda x_TE, *_: torch.empty_like(x_TE),
    "draw_filtered": lambda probs_RV, *_: torch.empty(len(probs_RV), dtype=torch.int64, device="meta"),
}


def choose_ops(
    platform: str,
    providers: Mapping[str, tuple[OpProvider, ...]],
    *,
    dtype: str,
    overrides: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Ops, dict[str, str]]:
    """Picks a provider for every op; returns the ops and the chosen provider's name by op.

    The highest priority that does not refuse the dtype wins; the reference (priority 0) is always there.
    `overrides` are the config's providers by op. Raises ConfigError on one that names nothing or refuses, and
    PluginContractError if the platform brings an op that the contract does not have.
    """
    for name in providers:
        if name not in OP_NAMES:
            raise PluginContractError(
                plugin=platform, hook="ops", expected=f"op names among {', '.join(OP_NAMES)}", got=repr(name)
            )
    for name in overrides:
        if name not in OP_NAMES:
            raise ConfigError(f"op_providers names {name!r}; the ops are: {', '.join(OP_NAMES)}")
    chosen: dict[str, OpProvider] = {}
    for name in OP_NAMES:
        own = OpProvider(name=REFERENCE, fn=getattr(reference, name), priority=0)
        candidates = [*providers.get(name, ()), own]
        chosen[name] = _choose(name, candidates, dtype, overrides.get(name))
    ops = Ops(**{name: provider.fn for name, provider in chosen.items()})
    return ops, {name: provider.name for name, provider in chosen.items()}


def _choose(op: str, candidates: list[OpProvider], dtype: str, wanted: str | None) -> OpProvider:
    if wanted is None:
        usable = [p for p in candidates if p.refuses(dtype) is None]
        return max(usable, key=lambda p: p.priority)
    for provider in candidates:
        if provider.name == wanted:
            reason = provider.refuses(dtype)
            if reason is not None:
                raise ConfigError(f"provider {wanted!r} of op {op!r} cannot be used: {reason}")
            return provider
    names = ", ".join(p.name for p in candidates)
    raise ConfigError(f"op {op!r} has no provider {wanted!r}; it has: {names}")


def choose_providers(
    platform: Platform, *, dtype: str, overrides: tuple[str, ...] = ()
) -> tuple[Ops, LinearTable, dict[str, str]]:
    """The ops, the linear methods and the chosen names by op, for a platform and "op=provider" items of the config.

    "linear" may name a linear method as well as a provider of the op. Raises as choose_ops and LinearTable do.
    """
    wanted = dict(item.split("=") for item in overrides)
    linear = wanted.get("linear")
    methods = platform.linear_methods()
    if any(method.name == linear for candidates in methods.values() for method in candidates):
        del wanted["linear"]
    ops, names = choose_ops(platform.name, platform.ops(), dtype=dtype, overrides=wanted)
    own = {
        op: FirstCall(getattr(ops, op), _REFERENCES_ON_META[op], plugin=platform.name, hook=f"ops[{op!r}] {name!r}")
        for op, name in names.items()
        if name != REFERENCE
    }
    ops = replace(ops, **own)
    table = LinearTable(
        platform.name,
        methods,
        ops.linear,
        linear_name=names["linear"],
        wanted=linear,
        allocator=platform.allocator,
        kept=wanted,
    )
    return ops, table, names
