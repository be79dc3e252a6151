"""What a platform brings for attention, linear layers and ops, and what would be chosen: data for people to read."""

from collections.abc import Iterator
from dataclasses import dataclass

from fairlead.interface import UNQUANTIZED, LinearMethod, LinearShape, OpProvider, Platform
from fairlead.ops.linear import LinearTable
from fairlead.ops.reference import linear
from fairlead.ops.table import OP_NAMES, REFERENCE, choose_ops


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderEntry:
    """One implementation. `kind` is "attention", "linear" or "op"; `name` what it implements: of attention nothing, of
    linear layers a scheme, of ops an op.

    `chosen_for` are the dtypes for which it would run if nothing else were asked for, `refused` the reasons of others.
    """

    kind: str
    name: str
    provider: str
    priority: int | None
    chosen_for: tuple[str, ...]
    refused: dict[str, str]


def list_providers(platform: Platform) -> list[ProviderEntry]:
    """Attention backends, then linear methods (of a layer of 4096 by 4096), then ops; the references last of each."""
    dtypes = platform.capabilities.dtypes
    backends = platform.attention_backends()
    entries = [
        ProviderEntry(
            kind="attention", name="", provider=name, priority=None, chosen_for=() if i else dtypes, refused={}
        )
        for i, name in enumerate(backends)
    ]
    return [*entries, *_linear_entries(platform), *_op_entries(platform)]


def _linear_entries(platform: Platform) -> Iterator[ProviderEntry]:
    methods = platform.linear_methods()
    table = LinearTable(platform.name, methods, linear, linear_name="op linear")
    shapes = {
        dtype: LinearShape(in_features=4096, out_features=4096, dtype=dtype) for dtype in platform.capabilities.dtypes
    }
    for scheme in table.schemes:
        chosen = {dtype: table.choose(scheme, shape) for dtype, shape in shapes.items()}
        own: tuple[LinearMethod, ...] = methods.get(scheme, ())
        for method in own:
            refused = {dtype: reason for dtype, shape in shapes.items() if (reason := method.refuses(shape))}
            takes = tuple(dtype for dtype, best in chosen.items() if best is method)
            yield ProviderEntry(
                kind="linear", name=scheme, provider=method.name, priority=None, chosen_for=takes, refused=refused
            )
        rest = tuple(dtype for dtype, best in chosen.items() if best not in own)
        last = "op linear" if scheme == UNQUANTIZED else REFERENCE
        yield ProviderEntry(kind="linear", name=scheme, provider=last, priority=None, chosen_for=rest, refused={})


def _op_entries(platform: Platform) -> Iterator[ProviderEntry]:
    providers = platform.ops()
    dtypes = platform.capabilities.dtypes
    chosen = {dtype: choose_ops(platform.name, providers, dtype=dtype)[1] for dtype in dtypes}
    for op in OP_NAMES:
        own = sorted(providers.get(op, ()), key=lambda p: -p.priority)
        for provider in (*own, OpProvider(name=REFERENCE, fn=linear, priority=0)):
            refused = {dtype: reason for dtype in dtypes if (reason := provider.refuses(dtype))}
            yield ProviderEntry(
                kind="op",
                name=op,
                provider=provider.name,
                priority=provider.priority,
                chosen_for=tuple(dtype for dtype in dtypes if chosen[dtype][op] == provider.name),
                refused=refused,
            )
