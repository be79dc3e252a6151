"""Logs of the server: lines on standard error, as text or as JSON. No prompt and no key stands in them."""

import json
import logging
import re
import sys

from fairlead.config import ServerConfig

_PROBE = re.compile(r'"[A-Z]+ /(health|ping|metrics|load)\b')


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(config: ServerConfig) -> None:
    """Sends all logs of this process to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else text)
    logging.basicConfig(handlers=[handler], level=config.log_level.upper())
    if config.log_level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # the banner says the rest
        logging.getLogger("uvicorn.access").addFilter(_is_no_probe)


def _is_no_probe(record: logging.LogRecord) -> bool:
    """Whether an access is worth a line; probes come every few seconds."""
    return _PROBE.search(record.getMessage()) is None
