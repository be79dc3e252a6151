"""The choice of providers, made once when a model is built."""

import dataclasses
from typing import Any

import pytest

from fairlead.errors import ConfigError, PluginContractError
from fairlead.interface import OpProvider
from fairlead.ops import reference
from fairlead.ops.table import OP_NAMES, TOLERANCE, choose_ops


def provider(name: str, **settings: Any) -> OpProvider:
    return OpProvider(name=name, fn=lambda *args: name, **settings)


def only_float32(dtype: str) -> str | None:
    return None if dtype == "float32" else f"it has no kernel for {dtype}"


def choose(*providers: OpProvider, dtype: str = "float32", overrides: tuple[str, ...] = ()) -> str:
    """The provider chosen for linear; checks that the function is that provider's."""
    wanted = dict(item.split("=") for item in overrides)
    ops, names = choose_ops("acme", {"linear": providers}, dtype=dtype, overrides=wanted)
    assert all(names[op] == "reference" for op in OP_NAMES if op != "linear")
    chosen = names["linear"]
    expected = reference.linear if chosen == "reference" else next(p.fn for p in providers if p.name == chosen)
    assert ops.linear is expected
    return chosen


def test_every_op_has_a_documented_reference() -> None:
    ops, names = choose_ops("acme", {}, dtype="float32")
    assert names == dict.fromkeys(OP_NAMES, "reference")
    for field in dataclasses.fields(ops):
        assert getattr(ops, field.name) is getattr(reference, field.name)
        assert getattr(reference, field.name).__doc__


def test_a_provider_comes_before_the_reference() -> None:
    assert choose(provider("a")) == "a"
    assert choose(provider("a", priority=1)) == "a"
    assert choose(provider("a", priority=-1)) == "reference"


def test_the_highest_priority_wins_and_the_first_of_equals() -> None:
    assert choose(provider("a"), provider("b", priority=20), provider("c")) == "b"
    assert choose(provider("a"), provider("b")) == "a"
    assert choose(provider("a", priority=0)) == "a"


def test_a_provider_that_refuses_the_dtype_is_passed_over() -> None:
    picky = provider("picky", priority=30, refuses=only_float32)
    assert choose(picky, provider("b")) == "picky"
    assert choose(picky, provider("b"), dtype="bfloat16") == "b"
    assert choose(picky, dtype="bfloat16") == "reference"


def test_an_override_wins() -> None:
    providers = (provider("a", priority=20), provider("b"))
    assert choose(*providers, overrides=("linear=b",)) == "b"
    assert choose(*providers, overrides=("linear=reference",)) == "reference"
    assert choose(*providers, overrides=("linear=b", "linear=a")) == "a"
    assert choose(*providers, overrides=("rms_norm=reference",)) == "a"


def test_an_override_that_refuses_is_an_error_with_its_reason() -> None:
    picky = provider("picky", refuses=only_float32)
    with pytest.raises(ConfigError, match="'picky' of op 'linear' cannot be used: it has no kernel for bfloat16"):
        choose(picky, dtype="bfloat16", overrides=("linear=picky",))


def test_an_unknown_provider_is_an_error_that_lists_them() -> None:
    with pytest.raises(ConfigError, match="op 'linear' has no provider 'c'; it has: a, b, reference"):
        choose(provider("a"), provider("b"), overrides=("linear=c",))


def test_an_unknown_op_is_an_error_that_lists_them() -> None:
    with pytest.raises(ConfigError, match="op_providers names 'matmul'; the ops are: embedding, linear, rms_norm"):
        choose(overrides=("matmul=reference",))


def test_a_platform_with_an_op_of_its_own_broke_the_contract() -> None:
    with pytest.raises(PluginContractError, match=r"plugin 'acme' broke the contract in ops: .* got 'matmul'"):
        choose_ops("acme", {"matmul": (provider("a"),)}, dtype="float32")


def test_every_dtype_of_the_config_has_a_tolerance() -> None:
    from fairlead.config import DTYPES

    assert set(TOLERANCE) == set(DTYPES) - {"auto"}
