"""What the front end and the engine's process say to each other: tagged msgpack structs, decoded strictly by type.

Nothing else crosses the sockets and nothing is ever unpickled: bytes of another shape raise ProtocolError.
"""

from typing import TypeVar

import msgspec

from fairlead.config import EngineConfig
from fairlead.request import EngineInfo, EngineStats, Request, SequenceDelta


class Startup(msgspec.Struct, frozen=True, tag=True):
    """What the process needs before all else, written to its standard input. Paths are of Unix sockets."""

    config: EngineConfig
    requests_path: str
    events_path: str
    niceness: int = 0


class Add(msgspec.Struct, frozen=True, tag=True):
    """A new request; the front end has checked it."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Frees a request, or only one sequence of it."""

    request_id: str
    index: int | None = None


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Ends the process."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded."""

    info: EngineInfo


class Step(msgspec.Struct, frozen=True, tag=True):
    """All that one step gave. `started` are the requests that it took up for the first time."""

    deltas: list[SequenceDelta]
    stats: EngineStats
    started: list[str] = []


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """The process is idle and well."""

    stats: EngineStats


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The engine refused one request; `error` is the name of a class of fairlead.errors."""

    request_id: str
    error: str
    message: str
    param: str | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Last words: the process ends. `error` is the name of the exception's class, `details` its traceback."""

    error: str
    message: str
    details: str = ""


ToEngine = Add | Abort | Stop
FromEngine = Ready | Step | Heartbeat | Rejected | Failed

T = TypeVar("T")


class ProtocolError(Exception):
    """Bytes that are no message of ours."""


_encoder = msgspec.msgpack.Encoder()
_startup: msgspec.msgpack.Decoder[Startup] = msgspec.msgpack.Decoder(Startup)
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: Startup | ToEngine | FromEngine) -> bytes:
    """The message as msgpack."""
    return _encoder.encode(message)


def decode_startup(data: bytes) -> Startup:
    """Raises ProtocolError if the bytes are no Startup."""
    return _decode(_startup, data)


def decode_to_engine(data: bytes) -> ToEngine:
    """Raises ProtocolError if the bytes are no message to the engine."""
    return _decode(_to_engine, data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Raises ProtocolError if the bytes are no message from the engine."""
    return _decode(_from_engine, data)


def _decode(decoder: "msgspec.msgpack.Decoder[T]", data: bytes) -> T:
    try:
        return decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise ProtocolError(f"not a message of the engine's protocol: {error}") from error
