"""An answer's way to the client: whole, or as server-sent events while it is written. Both carry the same text."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response

from groundup.base.generation import Delta
from groundup.serve.backend import Backend
from groundup.serve.generation import USAGE, Generation, fingerprint
from groundup.serve.schemas import SamplingFields
from groundup.serve.wire import EventStream, JsonResponse, event_bytes


class Choice(ABC):
    """One of the responses, in one of the API's forms."""

    index: int

    @abstractmethod
    def add(self, delta: Delta) -> list[dict[str, Any]]:
        """Take in what came; gives the stream's `choices` entries for it."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The finished response as the entry of an answer that is not streamed."""


class Reply:
    """All choices of one call, with the head that its answer or each of its events begins with."""

    def __init__(
        self, kind: str, prefix: str, backend: Backend, request: SamplingFields, choices: list[Choice]
    ) -> None:
        self._choices = choices
        self._is_stream = bool(request.stream)
        self._wants_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if self._is_stream and kind == "chat.completion" else kind,
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint(backend),
        }

    async def send(self, http: Request, generation: Generation) -> Response:
        """The response to give back to the framework; it closes the generation in every case."""
        http.scope[USAGE] = generation.usage
        if self._is_stream:
            events = self._events(generation)
            try:
                return EventStream(await anext(events), events)
            except BaseException:
                await generation.aclose()
                raise
        try:
            async for choice, delta in generation:
                self._choices[choice].add(delta)
        finally:
            await generation.aclose()
        answer = {**self._head, "choices": [choice.whole() for choice in self._choices]}
        return JsonResponse({**answer, "usage": generation.usage.wire()})

    async def _events(self, generation: Generation) -> AsyncIterator[bytes]:
        usage: dict[str, Any] = {"usage": None} if self._wants_usage else {}
        try:
            async for choice, delta in generation:
                entries = self._choices[choice].add(delta)
                if entries:
                    yield b"".join(event_bytes({**self._head, "choices": [entry], **usage}) for entry in entries)
        finally:
            await generation.aclose()
        if self._wants_usage:
            yield event_bytes({**self._head, "choices": [], "usage": generation.usage.wire()})
