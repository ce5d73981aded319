"""The HTTP server, which ends without losing what it holds.

On SIGTERM no connection is taken any more. Event streams end (clients come back with Last-Event-ID), requests in hand
are answered; influence calls that still wait when the grace is over are told 503 with Retry-After. Then the app's
lifespan ends, which hands the running job back to the queue.
"""

import asyncio
import socket

import uvicorn
from fastapi import FastAPI

from app.api.services import Services
from app.settings import Settings

PASS_S = 5.0
"""More than a shared pass takes: what is in the torch thread when the grace is over is still answered."""


class Server(uvicorn.Server):
    """Serves one app."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        grace = settings.shutdown_grace_s
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.host,
                port=settings.port,
                log_config=None,
                timeout_graceful_shutdown=int(grace + PASS_S),
            )
        )
        self._app = app
        self._grace = grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what is in hand, then end."""
        services: Services = self._app.state.services
        services.stopping.set()
        asyncio.get_running_loop().call_later(self._grace, services.gatherer.refuse_waiting)
        await super().shutdown(sockets)
