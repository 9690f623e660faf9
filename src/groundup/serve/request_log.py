"""One line a request, and its place in the metrics; never what it said."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from groundup.serve.generation import USAGE, Usage
from groundup.serve.metrics import Metrics
from groundup.serve.wire import CLIENT_GONE, STATUS

_logger = logging.getLogger(__name__)
_METHODS = {"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"}


class RequestLog:
    """ASGI middleware around everything, so that refused requests are seen as well.

    Choice: a route stands in the log by its pattern; a path that has none is left out, because anybody may have written
    anything into it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started_at = time.monotonic()
        status = CLIENT_GONE

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            self._record(scope, scope.get(STATUS, status), time.monotonic() - started_at)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        usage: Any = scope.get(USAGE)
        tokens = f" {usage.prompt_tokens}+{usage.completion_tokens} tokens" if isinstance(usage, Usage) else ""
        method = scope["method"] if scope["method"] in _METHODS else "other"
        _logger.info("%s %s %d %.0f ms%s", method, route, status, seconds * 1000, tokens)
