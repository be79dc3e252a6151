"""Where a platform's limits meet a model and its settings: every reason why not, before anything is allocated."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

from fairlead.contract import check_backend
from fairlead.errors import ConfigError
from fairlead.interface import AttentionBackend, AttentionShape, AttentionSpec, GraphRunner, Platform


def refusal(platform: Platform, reasons: Seq[str]) -> ConfigError:
    """The one error that lists every reason."""
    return ConfigError(f"platform {platform.name!r} cannot run this model so: {'; '.join(reasons)}")


def step_reasons(platform: Platform, graph_runner: GraphRunner, *, max_num_batched_tokens: int) -> list[str]:
    """Why steps of so many tokens cannot run."""
    capabilities, reasons = platform.capabilities, []
    most = capabilities.max_batched_tokens
    if most is not None and max_num_batched_tokens > most:
        reasons.append(f"max_num_batched_tokens {max_num_batched_tokens} (at most {most})")
    if capabilities.static_shapes and max_num_batched_tokens > graph_runner.buckets[-1]:
        largest = graph_runner.buckets[-1]
        reasons.append(f"max_num_batched_tokens {max_num_batched_tokens} (its largest static shape has {largest} rows)")
    return reasons


def backend_reason(platform: Platform, wanted: str) -> str:
    """Why there is no such attention backend: those that there are, and why the others are not."""
    why = dict(platform.unavailable_backends())
    own = next((why.pop(name) for name in list(why) if name.lower() == wanted.lower()), None)
    names = ", ".join(platform.attention_backends())
    reason = f"attention_backend {wanted} ({'it has ' if own is None else f'{own}; it has '}{names}"
    return f"{reason}{''.join(f'; not {name}: {text}' for name, text in why.items())})"


def kv_dtype_of(platform: Platform, wanted: str) -> str | None:
    """The torch name of what a user calls `wanted`, one of config.KV_DTYPES; None if the platform has none such.

    The 8-bit formats come in variants (OCP, or with a single zero) of which a device has one.
    """
    prefix = {"fp8": "float8_", "fp8_e4m3": "float8_e4m3", "fp8_e5m2": "float8_e5m2"}.get(wanted)
    known = platform.capabilities.kv_dtypes
    return next((name for name in known if name == wanted or (prefix and name.startswith(prefix))), None)


def make_backends(
    platform: Platform,
    names: Seq[str],
    groups: Mapping[AttentionSpec, int],
    *,
    block_size: int,
    dtype: str,
    kv_dtype: str,
) -> tuple[tuple[AttentionBackend, ...], list[str]]:
    """For each group of attention layers the first of the named backends that can serve it; why none can for the rest.

    Raises PluginContractError if what comes back is no backend.
    """
    backends: list[AttentionBackend] = []
    reasons: list[str] = []
    for spec, num_layers in groups.items():
        shape = AttentionShape(spec=spec, num_layers=num_layers, block_size=block_size, dtype=dtype, kv_dtype=kv_dtype)
        refused: list[str] = []
        for name in names:
            try:
                backend = platform.attention(name, shape)
            except ConfigError as error:
                refused.append(str(error))
                continue
            check_backend(platform.name, name, backend)
            backends.append(backend)
            break
        else:
            reasons += refused
    return tuple(backends), list(dict.fromkeys(reasons))


def head_size_reasons(platform: Platform, groups: Mapping[AttentionSpec, int]) -> list[str]:
    """Which head sizes the platform has not."""
    sizes = platform.capabilities.head_sizes
    missing = {spec.head_size for spec in groups} - set(sizes) if sizes else set()
    return [f"head size {size} (it has {', '.join(map(str, sizes))})" for size in sorted(missing)]
