"""What is wrong with a specification that a library would take. Runs in the worker, so it may take its time."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from fairlead.sampling.structured.backend import GrammarError

_SCALARS = {"string", "number", "integer", "boolean", "null"}
_COMMENTS = {"$schema", "$id", "$comment", "title", "description", "default", "examples"}
_XGRAMMAR_KEYWORDS = _COMMENTS | {
    *("type", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "enum", "const"),
    *("anyOf", "$ref", "$defs", "definitions", "minLength", "maxLength"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_SUBSCHEMAS = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")

Schema = dict[str, Any]


def check_spec(kind: str, text: str) -> None:
    """Raises GrammarError on regexes that match in exponentially many ways, and on a schema that no value fits."""
    if kind == "regex":
        check_regex(text)
    if kind != "json":
        return
    root = json.loads(text)
    for schema in subschemas(root):
        patterns = [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
        properties = schema.get("patternProperties")
        for pattern in [*patterns, *(properties if isinstance(properties, dict) else ())]:
            check_regex(pattern)
    _check_references(root)


def subschemas(root: object) -> Iterator[Schema]:
    """The schema and all those inside of it."""
    open_nodes = [root]
    while open_nodes:
        node = open_nodes.pop()
        if not isinstance(node, dict):
            continue
        yield node
        open_nodes += [node[key] for key in _SUBSCHEMAS if key in node]
        for key in _SCHEMA_LISTS:
            open_nodes += node[key] if isinstance(node.get(key), list) else []
        for key in _SCHEMA_MAPS:
            open_nodes += node[key].values() if isinstance(node.get(key), dict) else []


def xgrammar_knows(text: str) -> bool:
    """Whether xgrammar honours every keyword of a schema; those that it does not know it passes over."""
    for schema in subschemas(json.loads(text)):
        if not schema.keys() <= _XGRAMMAR_KEYWORDS or isinstance(schema.get("type"), list):
            return False
        choices = [key for key in ("$ref", "anyOf", "enum", "const") if key in schema]
        rest = schema.keys() - _COMMENTS - {"$defs", "definitions", "type"}
        if choices and len(rest) > 1:
            return False  # it follows one of them and forgets what stands beside
        bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} & schema.keys()
        if bounds and schema.get("type") not in ("integer", "number"):
            return False
        if "type" not in schema and not choices and rest:
            return False
    return True


def _check_references(root: Schema) -> None:
    """Every $ref must point into the schema, and some finite value must fit: {"$ref": "#"} alone has none."""
    references = {s["$ref"] for s in subschemas(root) if isinstance(s.get("$ref"), str)}
    targets = {reference: resolve(root, reference) for reference in references}
    finite: set[str] = set()
    grows = True
    while grows:
        found = {reference for reference in targets if reference not in finite and _ends(targets[reference], finite)}
        grows = bool(found)
        finite |= found
    if not _ends(root, finite):
        raise GrammarError("the schema refers to itself without end: no finite value fits it")


def resolve(root: Schema, reference: str) -> object:
    """What a $ref such as #/$defs/name points to. Raises GrammarError if it leads nowhere or out of the schema."""
    if reference != "#" and not reference.startswith("#/"):
        raise GrammarError(f"$ref must point into the schema, as in #/$defs/name, got {reference!r:.100}")
    node: object = root
    for part in unquote(reference).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and name in node:
            node = node[name]
        elif isinstance(node, list) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        else:
            raise GrammarError(f"$ref {reference!r:.100} points to nothing")
    return node


def _ends(schema: object, finite: set[str]) -> bool:
    """Whether some finite value can fit, when only the references in `finite` are known to have one."""
    if not isinstance(schema, dict):
        return schema is not False
    if isinstance(schema.get("$ref"), str) and schema["$ref"] not in finite:
        return False
    if not all(_ends(part, finite) for part in schema.get("allOf", ())):
        return False
    for key in ("anyOf", "oneOf"):
        if schema.get(key) and not any(_ends(part, finite) for part in schema[key]):
            return False
    kinds = schema.get("type", "any")
    kinds = set(kinds) if isinstance(kinds, list) else {kinds}
    if kinds & _SCALARS or "enum" in schema or "const" in schema:
        return True
    object_ends = all(
        _ends(schema.get("properties", {}).get(name, True), finite) for name in schema.get("required", ())
    )
    array_ends = not schema.get("minItems") or _ends(schema.get("items", True), finite)
    if kinds == {"array"}:
        return array_ends
    return object_ends


class _Group:
    """An open group of a regex: what its current alternative holds so far."""

    def __init__(self) -> None:
        self.is_endless = False  # some alternative is an endless repetition and nothing else
        self.num_endless = self.num_others = 0  # elements of this alternative
        self.last = "none"  # its newest element, to which a repetition may yet come: "none", "endless" or "other"

    def end_element(self) -> None:
        self.num_endless += self.last == "endless"
        self.num_others += self.last == "other"
        self.last = "none"

    def end_alternative(self) -> None:
        self.end_element()
        self.is_endless = self.is_endless or (self.num_endless > 0 and self.num_others == 0)
        self.num_endless = self.num_others = 0


def check_regex(regex: str) -> None:
    """Raises GrammarError on an endless repetition of what is an endless repetition itself, as in (a+)+.

    Such a regex matches a text in exponentially many ways and says no more than one repetition. One linear scan.
    """
    groups = [_Group()]
    is_after_group = False
    i = 0
    while i < len(regex):
        char = regex[i]
        group = groups[-1]
        repeat = _repetition(regex, i)
        if repeat is not None and group.last != "none":
            is_endless, i = repeat
            if is_endless and is_after_group and group.last == "endless":
                raise GrammarError(f"regex repeats what repeats already, at character {i}; write (a+)+ as a+")
            group.last = "endless" if is_endless else group.last
            is_after_group = False
            continue
        is_after_group = False
        if char == "|":
            group.end_alternative()
        elif char == "(":
            group.end_element()
            groups.append(_Group())
            i = _after_group_flags(regex, i)
            continue
        elif char == ")" and len(groups) > 1:
            group.end_alternative()
            groups.pop()
            groups[-1].last = "endless" if group.is_endless else "other"
            is_after_group = True
        elif char not in "^$":
            group.end_element()
            group.last = "other"
            i = _end_of_class(regex, i) if char == "[" else i + (char == "\\")
        i += 1


def _repetition(regex: str, i: int) -> tuple[bool, int] | None:
    """(whether it has no maximum, where it ends) of the repetition that stands at i."""
    if regex[i] in "*+?":
        is_endless, end = regex[i] != "?", i + 1
    elif regex[i] == "{":
        close = regex.find("}", i, i + 24)
        low, comma, high = regex[i + 1 : close].partition(",") if close > 0 else ("", "", "")
        if not low.isdecimal() or not (high == "" or high.isdecimal()):
            return None
        is_endless, end = bool(comma) and not high, close + 1
    else:
        return None
    if regex[end : end + 1] in ("?", "+"):  # lazy or possessive
        end += 1
    return is_endless, end


def _after_group_flags(regex: str, i: int) -> int:
    """Where the body of the group that opens at i begins."""
    if regex[i + 1 : i + 2] != "?":
        return i + 1
    for prefix in ("?:", "?=", "?!", "?<=", "?<!"):
        if regex.startswith(prefix, i + 1):
            return i + 1 + len(prefix)
    close = regex.find(">", i, i + 64)
    return close + 1 if close > 0 else i + 2


def _end_of_class(regex: str, i: int) -> int:
    """Where the character class that opens at i ends."""
    i += 1 + (regex[i + 1 : i + 2] == "^")
    i += regex[i : i + 1] == "]"
    while i < len(regex) and regex[i] != "]":
        i += 1 + (regex[i] == "\\")
    return i
