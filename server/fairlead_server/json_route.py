"""Routes whose body is JSON: strictly typed, strictly parsed, and of bounded depth."""

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from fairlead_server.errors import ApiError

MAX_NESTING = 200

_decoder = msgspec.json.Decoder()


class JsonRoute(APIRoute):
    """A route that takes nothing but `application/json`, where it takes a body at all."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            if self.body_field is not None:
                kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "application/json":
                    raise ApiError(415, "The body must be JSON, sent with Content-Type: application/json.")
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class _JsonRequest(Request):
    """A request whose body is parsed by our rules: no NaN, no lone surrogates, no bottomless nesting.

    FastAPI lets HTTPException through, and makes every other error one that says nothing.
    """

    async def json(self) -> object:
        body = await self.body()
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
