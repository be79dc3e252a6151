"""The ways in which a request asks for structured output: OpenAI's response_format, vLLM's fields new and old."""

from collections.abc import Mapping

from fairlead.errors import RequestError
from fairlead.request import StructuredOutputParams

KINDS = ("json", "json_object", "regex", "choice", "grammar")
FIELDS = ("response_format", "structured_outputs", *(f"guided_{kind}" for kind in KINDS))


def structured_outputs(fields: Mapping[str, object]) -> StructuredOutputParams | None:
    """What the request's fields ask for; None if the output is free.

    Raises RequestError if two of them ask at once, or on a form that is unknown or malformed.
    """
    asked: dict[str, dict[str, object]] = {}
    for name in FIELDS:
        value = fields.get(name)
        if value is not None and (kinds := _kinds(name, value)):
            asked[name] = kinds
    if len(asked) > 1:
        *_, last = asked
        raise RequestError(f"{' and '.join(asked)} cannot be given together; give one of them", param=last)
    for name, kinds in asked.items():
        try:
            return StructuredOutputParams(**kinds)  # type: ignore[arg-type]  # it checks every type itself
        except RequestError as error:
            raise RequestError(str(error), param=name) from error
    return None


def _kinds(name: str, value: object) -> dict[str, object]:
    """The arguments of StructuredOutputParams that a field stands for; none if it asks for nothing."""
    if name == "response_format":
        return _response_format(value)
    if name == "structured_outputs":
        return _structured_outputs(value)
    return {name.removeprefix("guided_"): value} if value is not False else {}


def _response_format(value: object) -> dict[str, object]:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema" or not isinstance(value, dict):
        raise RequestError(
            'response_format must be {"type": "text"}, {"type": "json_object"} or '
            '{"type": "json_schema", "json_schema": {"schema": ...}}',
            param="response_format",
        )
    holder = value.get("json_schema")
    schema = holder.get("schema") if isinstance(holder, dict) else None
    if not isinstance(schema, dict):
        raise RequestError("response_format needs json_schema.schema, a JSON schema", param="response_format")
    return {"json": schema}


def _structured_outputs(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise RequestError(
            f"structured_outputs must be an object with one of {', '.join(KINDS)}", param="structured_outputs"
        )
    given = {key: v for key, v in value.items() if v is not None and v is not False}
    for key in given:
        if key not in KINDS:
            raise RequestError(
                f"structured_outputs.{key} is not supported by this server; there are {', '.join(KINDS)}",
                param="structured_outputs",
            )
    if not given:
        raise RequestError(f"structured_outputs needs one of {', '.join(KINDS)}", param="structured_outputs")
    return given
