"""The tree of errors is the one that its docstring draws."""

import inspect
import re
from typing import Any

import pytest

from fairlead import errors


def classes() -> dict[str, type[Any]]:
    return {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__}


def drawn_parents(drawing: str) -> dict[str, str]:
    """Class to base, from the lines of the drawing: how far a name is indented says whose child it is."""
    parents: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in drawing.splitlines():
        match = re.match(r"[\s│├└─]*([A-Z]\w+)(?=$|\s+[(a-z])", line)
        if match is None or not match.group(1).endswith("Error"):
            continue
        indent, name = match.start(1), match.group(1)
        path = [(i, n) for i, n in path if i < indent]
        if path:
            parents[name] = path[-1][1]
        path.append((indent, name))
    return parents


def test_the_drawing_is_the_tree() -> None:
    real = {name: cls.__bases__[0].__name__ for name, cls in classes().items() if name != "FairleadError"}
    assert drawn_parents(errors.__doc__ or "") == real
    assert len(real) > 10


def test_every_error_is_a_fairlead_error() -> None:
    assert all(issubclass(cls, errors.FairleadError) for cls in classes().values())


@pytest.mark.parametrize("name", ["ConfigError", "RequestError", "ContextLengthError"])
def test_a_bad_argument_is_a_value_error_too(name: str) -> None:
    assert issubclass(classes()[name], ValueError)


def test_a_request_error_names_the_field() -> None:
    assert errors.RequestError("no").param is None
    error = errors.ContextLengthError("too long", param="prompt")
    assert (str(error), error.param) == ("too long", "prompt")


def test_a_contract_error_names_plugin_hook_expected_and_got() -> None:
    error = errors.PluginContractError(plugin="acme", hook="probe", expected="devices", got="None")
    assert str(error) == "plugin 'acme' broke the contract in probe: expected devices, got None"
    assert (error.plugin, error.hook, error.expected, error.got) == ("acme", "probe", "devices", "None")
