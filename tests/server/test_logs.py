"""Log lines as text and as JSON, without those of probes."""

import json
import logging

import pytest

from fairlead.config import ServerConfig
from fairlead_server.logs import set_up_logging


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_tells_what_happened_and_probes_leave_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    for logger in map(logging.getLogger, (None, "uvicorn.access", "uvicorn.error")):
        for name, value in (("handlers", []), ("filters", []), ("level", logger.level)):
            monkeypatch.setattr(logger, name, value)
    set_up_logging(ServerConfig(log_format=log_format))
    access = logging.getLogger("uvicorn.access")
    for path in ("/health", "/health/ready", "/metrics", "/v1/completions", "/healthy"):
        access.info('%s - "%s %s HTTP/%s" %d', "x", "GET", path, "1.1", 200)
    try:
        raise ZeroDivisionError("no\nway")
    except ZeroDivisionError:
        logging.getLogger("fairlead.server").exception("it failed")
    err = capsys.readouterr().err
    assert "/v1/completions" in err
    assert "/healthy" in err
    assert "/health " not in err
    assert "/metrics" not in err
    assert "/ready" not in err
    if log_format == "json":
        entries = [json.loads(line) for line in err.splitlines()]
        assert len(entries) == 3
        assert set(entries[0]) == {"time", "level", "logger", "message"}
        assert "ZeroDivisionError" in entries[2]["exception"]
