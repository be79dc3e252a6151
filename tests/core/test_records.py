"""Records behave alike with msgspec and without it."""

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fairlead import records


def without_msgspec(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module as it is where msgspec is not installed."""
    monkeypatch.setitem(sys.modules, "msgspec", None)
    spec = importlib.util.spec_from_file_location("records_without_msgspec", Path(records.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["with msgspec", "without msgspec"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return records if request.param == "with msgspec" else without_msgspec(monkeypatch)


def test_a_record_is_frozen_and_its_fields_are_named(module: Any) -> None:
    class Point(module.Record, kw_only=True):  # type: ignore[misc, name-defined]
        x: int
        y: int = 0

    point = Point(x=1)
    assert (point, repr(point)[-10:]) == (Point(x=1, y=0), "(x=1, y=0)")
    assert module.replaced(point, y=5) == Point(x=1, y=5)
    assert point.y == 0
    with pytest.raises(AttributeError):
        point.x = 2
    with pytest.raises(TypeError):
        Point(1, 2)


def test_the_two_are_different_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "msgspec" in records.Record.__mro__[1].__module__
    assert without_msgspec(monkeypatch).Record.__mro__[1] is object
