"""An OpenAI-compatible API with models that say what a test tells them, for the annotation application to ask."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

ANSWERS = {
    "alpha-7b": "Rain is **water** that falls from clouds.\n\n1. The sun warms the sea, and water rises as vapour.\n"
    "2. High up it cools into drops.\n3. The drops grow heavy and fall.",
    "beta-13b": "It rains when clouds hold more water than they can carry. Warm air lifts moisture from rivers and "
    "seas; cold air lets it go again.",
}
"""What models say unless told otherwise; their names must never reach an annotator."""


@dataclass
class FakeModels:
    """`answer(model, messages)` is what is said; `failures` are statuses to be answered with first, by model."""

    answer: Callable[[str, list[dict[str, str]]], str] = lambda model, messages: ANSWERS[model]
    failures: dict[str, list[int]] = field(default_factory=dict)
    cut_off: set[str] = field(default_factory=set)
    """Models whose stream ends in the middle."""
    seconds_a_word: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def complete(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            if waiting := self.failures.get(body["model"]):
                return Response(status_code=waiting.pop(0))
            return StreamingResponse(self._stream(body), media_type="text/event-stream")

        return app

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        words = self.answer(body["model"], body["messages"]).split(" ")
        for number, word in enumerate(words):
            if body["model"] in self.cut_off and number > len(words) // 2:
                return
            text = word if number == 0 else f" {word}"
            yield _event({"choices": [{"index": 0, "delta": {"content": text}, "token_ids": [number]}]})
            await asyncio.sleep(self.seconds_a_word)
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        yield "data: [DONE]\n\n"


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', **chunk})}\n\n"
