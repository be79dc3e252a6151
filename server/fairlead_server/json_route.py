"""Routes whose body is JSON: strictly typed, strictly parsed, and of bounded depth."""

import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from fairlead_server.errors import ApiError

MAX_NESTING = 200

_decoder = msgspec.json.Decoder()


class JsonRoute(APIRoute):
    """A route that takes nothing but `application/json`, where its endpoint takes a `body`, and returns a Response.

    FastAPI documents it; reading, parsing and checking the body is ours. Of dependencies it knows `http` alone, the
    request: to solve any that there might be is half of what FastAPI takes for a call.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        parameters = inspect.signature(self.endpoint).parameters
        if "body" not in parameters:
            return super().get_route_handler()
        assert parameters.keys() <= {"body", "http"}, self.path
        kind, endpoint, takes_http = parameters["body"].annotation, self.endpoint, "http" in parameters

        async def handle(request: Request) -> Response:
            found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if found != "application/json":
                raise ApiError(415, "The body must be JSON, sent with Content-Type: application/json.")
            body = _as(kind, _parsed(await request.body()))
            response: Response = await (endpoint(body, request) if takes_http else endpoint(body))
            return response

        return handle


def _as(kind: type[BaseModel], value: object) -> BaseModel:
    """The value as such a body. Raises RequestValidationError."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        causes = error.errors(include_url=False, include_context=False, include_input=False)
        raise RequestValidationError([{**cause, "loc": ("body", *cause["loc"])} for cause in causes]) from error


def _parsed(body: bytes) -> object:
    """The JSON by our rules: no NaN, no lone surrogates, no bottomless nesting. Raises the 400 of what is none."""
    too_deep = HTTPException(400, f"The body is nested more than {MAX_NESTING} levels deep.")
    try:
        value = _decoder.decode(body)
    except RecursionError as error:
        raise too_deep from error
    except UnicodeDecodeError as error:
        raise HTTPException(400, "The body is not valid JSON: it is not UTF-8.") from error
    except msgspec.DecodeError as error:
        raise HTTPException(400, f"The body is not valid JSON: {error}.") from error
    if body.count(b"[") + body.count(b"{") > MAX_NESTING and _depth(value) > MAX_NESTING:
        raise too_deep
    return value


def _depth(value: object) -> int:
    """How many containers stand within each other, counted no further than is refused."""
    depth, level = 0, [value]
    while level and depth <= MAX_NESTING:
        inner: list[object] = []
        for item in level:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        level = [item for item in inner if isinstance(item, (dict, list))]
        depth += 1
    return depth
