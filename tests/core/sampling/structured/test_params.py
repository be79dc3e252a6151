"""What is refused before any library sees it, and what a specification becomes."""

import json
from typing import Any

import pytest

from fairlead import SamplingParams, StructuredOutputParams
from fairlead.errors import RequestError
from fairlead.sampling.structured.params import MAX_CHOICES, MAX_DEPTH, MAX_SPEC_BYTES


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


CYCLE: dict[str, Any] = {}
CYCLE["items"] = CYCLE


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"json_object": False},
        {"regex": "a", "choice": ["a"]},
        {"json": {}, "json_object": True},
        {"json": "{"},
        {"json": "[]"},
        {"json": "NaN"},
        {"json": '{"minimum": Infinity}'},
        {"json": {"minimum": float("nan")}},
        {"json": {"const": object()}},
        {"json": 5},
        {"json": nested(MAX_DEPTH)},
        {"json": json.dumps(nested(MAX_DEPTH))},
        {"json": "[" * 100_000},
        {"json": CYCLE},
        {"json": {"enum": [f"v{i}" for i in range(100_000)]}},
        {"json": {"anyOf": [{"enum": list(range(MAX_CHOICES))}, {"enum": [1]}]}},
        {"json": {"title": "x" * MAX_SPEC_BYTES}},
        {"json_object": "yes"},
        {"regex": ""},
        {"regex": 5},
        {"regex": "(" * 30_000 + "a" + ")" * 30_000},
        {"regex": "a" * (MAX_SPEC_BYTES + 1)},
        {"regex": "\ud800"},
        {"choice": []},
        {"choice": "abc"},
        {"choice": ["a", ""]},
        {"choice": ["a", 1]},
        {"choice": [str(i) for i in range(MAX_CHOICES + 1)]},
        {"grammar": "  "},
    ],
)
def test_what_is_wrong_by_its_form_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"^structured_outputs: ") as raised:
        StructuredOutputParams(**given)
    assert raised.value.param == "structured_outputs"


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"json": {"b": 1, "a": "é"}}, "json", '{"b":1,"a":"é"}'),
        ({"json": ' {"b": 1,\n "a": "\\u00e9"}'}, "json", '{"b":1,"a":"é"}'),
        ({"json_object": True}, "json_object", '{"type":"object"}'),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["b", "a", "b"]}, "choice", '["b", "a"]'),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
    ],
)
def test_a_specification_is_one_text_of_one_kind(given: dict[str, Any], kind: str, text: str) -> None:
    spec = StructuredOutputParams(**given)
    assert (spec.kind, spec.text) == (kind, text)
    assert hash(spec) == hash(StructuredOutputParams(**given))


def test_the_depth_counts_brackets_outside_of_strings_only() -> None:
    StructuredOutputParams(json=json.dumps({"const": "[" * 1000 + '\\"' + "{" * 1000}))
    StructuredOutputParams(json=nested(MAX_DEPTH - 1))
    StructuredOutputParams(regex=r"\(" * 1000)


def test_sampling_params_take_nothing_else() -> None:
    with pytest.raises(RequestError, match="StructuredOutputParams"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
