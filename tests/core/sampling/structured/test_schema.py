"""Regexes that repeat a repetition, schemas without a value, keywords that a library passes over."""

import json
from typing import Any

import pytest

from fairlead.sampling.structured.backend import GrammarError, choice_regex, whole_regex
from fairlead.sampling.structured.schema import check_regex, check_spec, resolve, xgrammar_knows


@pytest.mark.parametrize(
    "regex",
    ["(a+)+b", "(a*)*", "((a+))+", "(a|b+)*", "(?:a+){2,}", "((a+)?)+", "(?P<x>[a-z]+)*", "x(y(a+)*)", "(a+)+?"],
)
def test_a_repeated_repetition_is_refused(regex: str) -> None:
    with pytest.raises(GrammarError, match="repeats"):
        check_regex(regex)
    with pytest.raises(GrammarError, match="repeats"):
        check_spec("json", json.dumps({"properties": {"a": {"type": "string", "pattern": regex}}}))
    with pytest.raises(GrammarError, match="repeats"):
        check_spec("json", json.dumps({"patternProperties": {regex: {}}}))


@pytest.mark.parametrize(
    "regex",
    [
        *("a+", "(ab+)+", "([a-z]+ )+", r"(\w+\s?)+", "(a|b)+", "[(a+)+]", r"\(a+\)+", "(a{2,3})+", "(?:ab)*", "a{x}+"),
        *("(a+)", "(a+)?", "(a+){3}", "[]a+]+", "[^]+]*", "(?i)a+", "*", "(", ")+", "a{", "[", "\\"),
    ],
)
def test_others_pass(regex: str) -> None:
    check_regex(regex)


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        {"allOf": [{"type": "string"}, {"$ref": "#"}]},
        {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"$ref": "#/$defs/missing"},
        {"$ref": "https://example.org/schema.json"},
        {"$ref": "file:///etc/passwd"},
        {"prefixItems": [{}], "$ref": "#/prefixItems/7"},
    ],
)
def test_a_schema_without_a_finite_value_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(GrammarError):
        check_spec("json", json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"type": "array", "items": {"$ref": "#"}},
        {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]},
        {"type": ["object", "string"], "properties": {"x": {"$ref": "#"}}, "required": ["x"]},
        {"$defs": {"a/b~": {"type": "string"}}, "$ref": "#/$defs/a~1b~0"},
        {"$defs": {"a b": {"type": "string"}}, "$ref": "#/$defs/a%20b"},
    ],
)
def test_a_schema_that_can_end_passes(schema: dict[str, Any]) -> None:
    check_spec("json", json.dumps(schema))


def test_a_pointer_goes_through_lists() -> None:
    assert resolve({"anyOf": [{}, {"type": "null"}]}, "#/anyOf/1") == {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "known"),
    [
        ({"type": "string", "maxLength": 3}, True),
        ({"type": "string", "pattern": "a"}, False),
        ({"type": "integer", "minimum": 3}, True),
        ({"type": "number", "minimum": 3}, True),
        ({"minimum": 3}, False),
        ({"type": "integer", "multipleOf": 3}, False),
        ({"type": ["string", "null"]}, False),
        ({"anyOf": [{"type": "null"}], "minimum": 3}, False),
        ({"oneOf": [{"type": "null"}]}, False),
        ({"type": "object", "properties": {"uniqueItems": {"type": "null"}}}, True),
        ({"properties": {"a": {"type": "null"}}}, False),
        ({"enum": [1, 2], "title": "x"}, True),
    ],
)
def test_xgrammar_gets_what_it_knows_only(schema: dict[str, Any], known: bool) -> None:
    assert xgrammar_knows(json.dumps(schema)) is known


@pytest.mark.parametrize(
    ("regex", "whole"),
    [("^a$", "a"), ("a", "a"), (r"a\$", r"a\$"), (r"a\\$", r"a\\"), ("^a", "a"), ("a$", "a")],
)
def test_anchors_at_the_ends_say_nothing(regex: str, whole: str) -> None:
    assert whole_regex(regex) == whole


def test_choices_are_taken_literally() -> None:
    assert choice_regex('["a.b", "c|d"]') == r"a\.b|c\|d"
