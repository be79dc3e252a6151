"""What a structured output must look like, as the user gives it. Plain data, checked in linear time; no library."""

import json as jsonlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fairlead.errors import RequestError

MAX_SPEC_BYTES = 256 * 1024
MAX_DEPTH = 64  # of JSON values in a schema, and of groups in a regex
MAX_CHOICES = 4096  # of `choice`, and of all enums of a schema together
MAX_NODES = 65_536  # JSON values in a schema

KINDS = ("json", "json_object", "regex", "choice", "grammar")
JSON_OBJECT_SCHEMA = '{"type":"object"}'


def spec_error(message: str) -> RequestError:
    """The error of a specification that cannot be honoured."""
    return RequestError(f"structured_outputs: {message}", param="structured_outputs")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputParams:
    """The form that the output must have: exactly one of the kinds is given.

    `json` is a JSON schema (a dict, or its text; kept as text), `json_object` any JSON object, `regex` an expression
    that the whole output matches, `choice` a list of which the output is one, and `grammar` a context-free grammar in
    Lark's syntax (rule `start`) or in EBNF with `::=` (rule `root`). Raises RequestError on anything else, and on a
    specification that is too large or nested too deeply; whether it compiles is found out before the request runs.
    """

    json: str | dict[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.json_object not in (True, False):
            raise spec_error(f"json_object must be true or false, got {self.json_object!r:.100}")
        object.__setattr__(self, "json_object", bool(self.json_object))
        given = [kind for kind in KINDS if getattr(self, kind) not in (None, False)]
        if len(given) != 1:
            raise spec_error(f"give exactly one of {', '.join(KINDS)}, got {' and '.join(given) or 'none'}")
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        elif self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None:
                if not isinstance(value, str) or not value.strip():
                    raise spec_error(f"{name} must be a text that is not empty, got {value!r:.100}")
                _check_size(name, value)
        if self.regex is not None:
            _check_groups(self.regex)

    @property
    def kind(self) -> str:
        """Which one of KINDS was given."""
        return next(kind for kind in KINDS if getattr(self, kind) not in (None, False))

    @property
    def text(self) -> str:
        """The specification as one text: equal texts of a kind mean equal grammars."""
        if self.json_object:
            return JSON_OBJECT_SCHEMA
        if self.choice is not None:
            return jsonlib.dumps(self.choice, ensure_ascii=False)
        text = self.json or self.regex or self.grammar
        assert isinstance(text, str)
        return text


def _check_size(name: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise spec_error(f"{name} is not valid Unicode: it has a lone surrogate") from error
    if size > MAX_SPEC_BYTES:
        raise spec_error(f"{name} has {size} bytes, at most {MAX_SPEC_BYTES} are taken")


def _choices(given: object) -> tuple[str, ...]:
    if not isinstance(given, (list, tuple)) or not given:
        raise spec_error(f"choice must be a list of texts, got {given!r:.100}")
    if len(given) > MAX_CHOICES:
        raise spec_error(f"choice has {len(given)} entries, at most {MAX_CHOICES} are taken")
    if not all(isinstance(text, str) and text for text in given):
        raise spec_error("choice must hold texts that are not empty")
    _check_size("choice", "".join(given))
    return tuple(dict.fromkeys(given))


def _schema_text(given: object) -> str:
    """A schema as compact text. The order of its properties, which is the order of the output, stays."""
    if isinstance(given, str):
        _check_size("json", given)
        if _depth(given) > MAX_DEPTH:
            raise spec_error(f"json is nested more than {MAX_DEPTH} deep")
        try:
            schema = jsonlib.loads(given, parse_constant=_no_constant)
        except ValueError as error:
            raise spec_error(f"json is not valid JSON: {error!s:.200}") from error
    else:
        schema = given
    if not isinstance(schema, Mapping):
        raise spec_error(f"json must be a JSON schema, that is an object, got {schema!r:.100}")
    _check_tree(schema)
    try:
        text = jsonlib.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise spec_error(f"json is not made of JSON values: {error!s:.200}") from error
    _check_size("json", text)
    return text


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _check_tree(schema: object) -> None:
    """Bounds the depth, the number of values and the length of enums; a dict that holds itself is too deep."""
    open_nodes: list[tuple[object, int]] = [(schema, 1)]
    num_nodes = num_enum = 0
    while open_nodes:
        node, depth = open_nodes.pop()
        num_nodes += 1
        if depth > MAX_DEPTH and isinstance(node, (dict, list, tuple)):
            raise spec_error(f"json is nested more than {MAX_DEPTH} deep")
        if num_nodes > MAX_NODES:
            raise spec_error(f"json holds more than {MAX_NODES} values")
        if isinstance(node, dict):
            enum = node.get("enum")
            num_enum += len(enum) if isinstance(enum, (list, tuple)) else 0
            open_nodes += [(value, depth + 1) for value in node.values()]
        elif isinstance(node, (list, tuple)):
            open_nodes += [(value, depth + 1) for value in node]
        if num_enum > MAX_CHOICES:
            raise spec_error(f"json has enums of more than {MAX_CHOICES} values")


def _depth(text: str) -> int:
    """How deep the brackets of a JSON text are nested; those inside of strings do not count."""
    depth = deepest = 0
    in_string = escaped = False
    for char in text:
        if in_string:
            in_string = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest


def _check_groups(regex: str) -> None:
    depth = 0
    escaped = False
    for char in regex:
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char == "(":
            depth += 1
            if depth > MAX_DEPTH:
                raise spec_error(f"regex has groups nested more than {MAX_DEPTH} deep")
        elif char == ")":
            depth -= 1
