"""Logs: structlog, one event a line, JSON away from a terminal; request_id and job_id ride in contextvars."""

import logging
import re
import sys
from typing import Any

import structlog

KEY = re.compile(r"(hw_[0-9a-f]{24}_)[A-Za-z0-9_-]{43}")
PASSWORD = re.compile(r"(?<=://)([^:/@\s]*):[^\s\"']*@")  # up to the last @, for one may be in the password
OPTION = re.compile(r"([?&][a-z_]*(?:password|secret|token)=)[^&\s\"']*", re.IGNORECASE)


def masked(text: str) -> str:
    """The text without API keys and without the passwords of addresses, wherever they got into it from."""
    return OPTION.sub(r"\1***", PASSWORD.sub(r"\1:***@", KEY.sub(r"\1***", text)))


def _mask(_logger: Any, _name: str, line: Any) -> str:
    return masked(line)


def configure(level: str, as_json: bool | None) -> None:
    """Set structlog up, and send what libraries log through the standard library the same way."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    plain = as_json if as_json is not None else not sys.stderr.isatty()
    renderer: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if plain
        else [structlog.dev.ConsoleRenderer()]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer, _mask],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for noisy in ("uvicorn.access", "docket", "alembic", "aiosqlite"):
        logging.getLogger(noisy).setLevel("WARNING")
