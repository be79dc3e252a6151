"""Every error leaves as OpenAI's envelope: {"error": {"message", "type", "param", "code"}}."""

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from fairlead.errors import ContextLengthError, DeadlineError, EngineDeadError, RequestError

RETRY_AFTER_S = 1
_MAX_MESSAGE_CHARS = 500  # what a client sent is echoed in part only
CLIENT_CLOSED_REQUEST = 499  # nobody reads it; it is for the log

logger = logging.getLogger("fairlead.server")


class ApiError(Exception):
    """An error with its HTTP status and the fields of the envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.type, self.param, self.code = status, type, param, code
        self.headers = {} if retry_after_s is None else {"retry-after": str(retry_after_s)}

    @property
    def body(self) -> dict[str, object]:
        """The envelope."""
        message = str(self)[:_MAX_MESSAGE_CHARS].encode("utf-8", "replace").decode()
        return {"error": {"message": message, "type": self.type, "param": self.param, "code": self.code}}


def envelope(error: ApiError) -> Response:
    """The error as a whole answer."""
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


class ClientDisconnectedError(Exception):
    """The client left before its answer was complete."""


def model_not_found(name: str) -> ApiError:
    """The error of a model name that is not served."""
    return ApiError(
        404, f"The model `{name[:200]}` does not exist.", type="not_found_error", param="model", code="model_not_found"
    )


def overloaded(message: str) -> ApiError:
    """The error of a request that finds the queue full, or that waited in it for too long."""
    return ApiError(429, message, type="rate_limit_error", code="overloaded", retry_after_s=RETRY_AFTER_S)


def unavailable(message: str) -> ApiError:
    """The error of a server that takes no requests any more; another one may."""
    return ApiError(503, message, type="service_unavailable_error", retry_after_s=RETRY_AFTER_S)


def as_api_error(error: Exception) -> ApiError:
    """The error as a client may see it; what is not meant for clients is logged and becomes a bare 500."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return ApiError(400, str(error), param=error.param, code="context_length_exceeded")
        case RequestError():
            return ApiError(400, str(error), param=error.param)
        case EngineDeadError():
            return unavailable("The engine has ended; the server is about to stop.")
        case DeadlineError(queued=True):
            return overloaded(str(error))
        case DeadlineError():
            return ApiError(504, str(error), type="timeout_error", code="request_timeout")
        case RequestValidationError():
            return _from_validation(error)
        case HTTPException():
            return ApiError(error.status_code, str(error.detail), type=_type_of(error.status_code))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "The server failed on this request.", type="server_error")


def install(app: FastAPI) -> None:
    """Makes every error that is raised on purpose an envelope; `middleware.Failures` has the others."""

    async def handle(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            return _no_route(request, error)
        return envelope(as_api_error(error))

    async def gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for kind in (ApiError, RequestError, DeadlineError, EngineDeadError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, handle)
    app.add_exception_handler(ClientDisconnectedError, gone)


def _no_route(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path[:200]}"
    if error.status_code == 404:
        known = ApiError(404, f"There is no route {where}.", type="not_found_error", code="not_found")
    else:
        known = ApiError(405, f"The method of {where} is not allowed here.", code="method_not_allowed")
    return JSONResponse(known.body, status_code=known.status, headers=error.headers)


def _type_of(status: int) -> str:
    if status == 404:
        return "not_found_error"
    return "invalid_request_error" if status < 500 else "server_error"


def _from_validation(error: RequestValidationError) -> ApiError:
    """One sentence per cause, without what the client sent. A field that allows several types has several causes."""
    causes = error.errors()
    first = causes[0]
    field = next((part for part in first["loc"][1:] if isinstance(part, str)), None)
    if field is None:
        return ApiError(400, "The body must be a JSON object.")
    same = [cause for cause in causes if field in cause["loc"][:2]]
    reasons = dict.fromkeys(_sentence(cause["msg"]) for cause in same[:4])
    return ApiError(400, f"{field}: {', or '.join(reasons)}", param=field)


def _sentence(message: str) -> str:
    return (
        message[:150]
        .replace("Input should be", "must be")
        .removeprefix("Value error, ")
        .replace("Field required", "this field is required")
    )
