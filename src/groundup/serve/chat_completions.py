"""POST /v1/chat/completions."""

from collections.abc import Collection
from typing import Any

from fastapi import APIRouter, Request, Response

from groundup.base.errors import UserError
from groundup.base.generation import Delta, FinishReason
from groundup.serve.backend import Backend
from groundup.serve.generation import Generation, Service, constraint_of, room_for, sampling_params
from groundup.serve.logprobs import ChatLogprobs
from groundup.serve.reply import Choice, Reply
from groundup.serve.schemas import ChatRequest, parse_request
from groundup.serve.wire import ApiError, as_api_error, parse_json, until_disconnect


def chat_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat_completions(http: Request) -> Response:
        request = parse_request(ChatRequest, parse_json(await http.body()))
        backend = service.model(request.model)
        return await until_disconnect(http.receive, _answer(service, backend, request, http))

    return router


async def _answer(service: Service, backend: Backend, request: ChatRequest, http: Request) -> Response:
    try:
        prompt = backend.chat.encode_prompt([message.message for message in request.messages])
    except UserError as error:
        raise as_api_error(error, "messages") from None
    params = sampling_params(
        request,
        backend,
        max_new_tokens=room_for(prompt, _most_tokens(request), backend, "messages"),
        stop_ids=backend.chat.stop_ids,
        logprobs=_most_logprobs(request),
        constraint=await constraint_of(request, service, backend, backend.chat.stop_ids),
    )
    choices: list[Choice] = [
        _ChatChoice(index, backend, params.stop_ids, _most_logprobs(request)) for index in range(params.num_samples)
    ]
    reply = Reply("chat.completion", "chatcmpl", backend, request, choices)
    return await reply.send(http, await Generation.begin(service, backend, [prompt], [params]))


def _most_tokens(request: ChatRequest) -> int | None:
    """`max_completion_tokens` is OpenAI's newer name of `max_tokens`."""
    if request.max_tokens and request.max_completion_tokens and request.max_tokens != request.max_completion_tokens:
        raise ApiError(400, "max_tokens and max_completion_tokens differ; give one of them", param="max_tokens")
    return request.max_completion_tokens or request.max_tokens


def _most_logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None


class _ChatChoice(Choice):
    def __init__(self, index: int, backend: Backend, stop_ids: Collection[int], logprobs: int | None) -> None:
        self.index = index
        self._stop_ids = stop_ids
        self._text = AnswerText(trims=backend.chat.name == "llama2")
        self._logprobs = None if logprobs is None else ChatLogprobs(backend.tokenizer, logprobs)
        self._pieces: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._finish_reason: FinishReason | None = None
        self._is_begun = False

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        ended_by_token = bool(delta.token_ids) and delta.token_ids[-1] in self._stop_ids
        text = self._text.push(delta.text, delta.finish_reason is not None, ended_by_token)
        count = len(delta.token_ids) - ended_by_token
        entries = self._logprobs.add(delta.token_ids[:count], delta.logps, delta.top_logps) if self._logprobs else []
        self._pieces.append(text)
        self._entries += entries
        chunks = []
        if not self._is_begun:
            self._is_begun = True
            chunks.append(self._chunk({"role": "assistant", "content": ""}))
        if text or entries:
            chunks.append(self._chunk({"content": text}, entries))
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
            chunks.append(self._chunk({}, finish_reason=delta.finish_reason))
        return chunks

    def whole(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "message": {"role": "assistant", "content": "".join(self._pieces), "refusal": None},
            "logprobs": {"content": self._entries, "refusal": None} if self._logprobs else None,
            "finish_reason": self._finish_reason,
        }

    def _chunk(
        self,
        delta: dict[str, Any],
        entries: list[dict[str, Any]] | None = None,
        finish_reason: FinishReason | None = None,
    ) -> dict[str, Any]:
        logprobs = {"content": entries, "refusal": None} if entries else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class AnswerText:
    """What an answer says without the space that Llama 2's format puts between it and the token that ends it.

    Why: the space belongs to the frame (`Llama2Chat`), and models that were trained with it write it. So spaces are
    held back until something follows them.
    """

    def __init__(self, trims: bool) -> None:
        self._trims = trims
        self._held = ""

    def push(self, text: str, is_last: bool, ended_by_token: bool) -> str:
        """The text that is final now."""
        text = self._held + text
        if not self._trims or (is_last and not ended_by_token):
            return text
        final = text.rstrip(" ")
        self._held = text[len(final) :]
        return final
