"""Who may call: API keys, compared in constant time on digests, and origins of other pages."""

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from pathlib import Path

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from fairlead.config import ServerConfig
from fairlead.errors import ConfigError
from fairlead_server.errors import ApiError, envelope
from fairlead_server.middleware import raw_path

OPEN_PATHS = frozenset({b"/health", b"/health/live", b"/health/ready", b"/health/startup", b"/ping", b"/version"})


def read_keys(config: ServerConfig) -> tuple[str, ...]:
    """All keys that open the server. Raises ConfigError if their file cannot be read or holds none."""
    if config.api_key_file is None:
        return config.api_key
    try:
        lines = Path(config.api_key_file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {config.api_key_file} cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"api_key_file {config.api_key_file} holds no key; write one per line")
    return (*config.api_key, *keys)


def tenant_of(http: HTTPConnection) -> str:
    """Whose request it is, as a name that is made anew by every server; empty where no key was asked for."""
    return str(getattr(http.state, "tenant", ""))


class Keys:
    """Asks for a key on every path, whatever its spelling or method, but for those that are named as open.

    `request.state.tenant` tells apart who came with which key. It holds nothing of the key.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: frozenset[bytes]) -> None:
        self._app, self._open_paths = app, open_paths
        self._secret = secrets.token_bytes(32)
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or raw_path(scope) in self._open_paths or self._may_pass(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "A valid API key is needed; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
            type="authentication_error",
            code="invalid_api_key",
        )
        error.headers["www-authenticate"] = "Bearer"
        await envelope(error)(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                shown = _digest(value[7:].strip())
            elif name == b"x-api-key":
                shown = _digest(value.strip())
            else:
                continue
            if sum(hmac.compare_digest(shown, digest) for digest in self._digests):  # all of them, whichever fits
                tenant = hmac.digest(self._secret, shown, "sha256").hex()
                scope.setdefault("state", {})["tenant"] = tenant
                return True
        return False


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
