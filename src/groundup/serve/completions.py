"""POST /v1/completions: a text, or token ids, continued."""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from groundup.base.generation import Delta, FinishReason, PromptScores, SamplingParams
from groundup.serve.backend import Backend
from groundup.serve.config import DEFAULT_COMPLETION_TOKENS, MAX_CHOICES
from groundup.serve.generation import Generation, Service, constraint_of, encode_input, room_for, sampling_params
from groundup.serve.logprobs import CompletionLogprobs
from groundup.serve.reply import Choice, Reply
from groundup.serve.schemas import CompletionRequest, parse_request
from groundup.serve.wire import ApiError, parse_json, until_disconnect


def completions_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(http: Request) -> Response:
        request = parse_request(CompletionRequest, parse_json(await http.body()))
        backend = service.model(request.model)
        _check(request)
        return await until_disconnect(http.receive, _answer(service, backend, request, http))

    return router


def _check(request: CompletionRequest) -> None:
    n = request.n or 1
    if n * len(request.prompt) > MAX_CHOICES:
        message = f"{n} responses to {len(request.prompt)} prompts are more than {MAX_CHOICES} at a time"
        raise ApiError(400, message, param="n", code="invalid_value")
    if request.best_of is not None and request.best_of != n:
        raise ApiError(400, "best_of is not supported; ask for n responses instead", param="best_of")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError(400, "max_tokens must be at least 1 unless echo is true", param="max_tokens")


async def _answer(service: Service, backend: Backend, request: CompletionRequest, http: Request) -> Response:
    prompts = [encode_input(item, backend, "prompt") for item in request.prompt]
    asked = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
    constraint = await constraint_of(request, service, backend, (backend.tokenizer.eos_id,))
    params = [
        sampling_params(
            request,
            backend,
            max_new_tokens=room_for(prompt, asked, backend, "prompt"),
            stop_ids=(backend.tokenizer.eos_id,),
            logprobs=request.logprobs,
            constraint=constraint,
        )
        for prompt in prompts
    ]
    scores = [await _scores(request, backend, prompt) for prompt in prompts]
    choices: list[Choice] = []
    for item, prompt, each, prompt_scores in zip(request.prompt, prompts, params, scores):
        text = item if isinstance(item, str) else backend.tokenizer.decode(item)
        for _ in range(each.num_samples):
            choice = _TextChoice(len(choices), backend, each, request.logprobs, len(text))
            if request.echo:
                choice.echo(text, prompt, prompt_scores, request.logprobs or 0)
            choices.append(choice)
    reply = Reply("text_completion", "cmpl", backend, request, choices)
    return await reply.send(http, await Generation.begin(service, backend, prompts, params, continues=True))


async def _scores(request: CompletionRequest, backend: Backend, prompt: list[int]) -> PromptScores | None:
    if not request.echo or request.logprobs is None:
        return None
    return await backend.score(prompt, request.logprobs)


class _TextChoice(Choice):
    def __init__(
        self, index: int, backend: Backend, params: SamplingParams, logprobs: int | None, prompt_characters: int
    ) -> None:
        self.index = index
        self._tokenizer = backend.tokenizer
        self._stop_ids = params.stop_ids
        self._logprobs: CompletionLogprobs | None = None
        if logprobs is not None:
            self._logprobs = CompletionLogprobs(backend.tokenizer, logprobs, prompt_characters, keeps_space=True)
        self._pieces: list[str] = []
        self._lists: list[dict[str, Any]] = []
        self._unsent = 0
        """Pieces that the stream has not had: 1 after `echo`."""
        self._finish_reason: FinishReason | None = None

    def echo(self, text: str, prompt: Sequence[int], scores: PromptScores | None, top: int) -> None:
        """Begin with the prompt."""
        self._pieces.append(text)
        self._unsent = 1
        if scores is not None:
            places = CompletionLogprobs(self._tokenizer, top, 0, keeps_space=False)
            self._lists.append(places.add(prompt, [None, *scores.logps], [[], *scores.top_logps]))

    def add(self, delta: Delta) -> list[dict[str, Any]]:
        ended_by_token = bool(delta.token_ids) and delta.token_ids[-1] in self._stop_ids
        token_ids = delta.token_ids[: len(delta.token_ids) - ended_by_token]
        chunks = []
        if self._unsent:
            self._unsent = 0
            chunks.append(self._chunk(self._pieces[0], self._lists[0] if self._lists else None, None))
        lists = self._logprobs.add(token_ids, delta.logps, delta.top_logps) if self._logprobs and token_ids else None
        self._pieces.append(delta.text)
        if lists is not None:
            self._lists.append(lists)
        self._finish_reason = delta.finish_reason
        if delta.text or lists is not None or delta.finish_reason is not None:
            chunks.append(self._chunk(delta.text, lists, delta.finish_reason))
        return chunks

    def whole(self) -> dict[str, Any]:
        lists = None
        if self._logprobs is not None:
            lists = _joined(self._lists)
        return self._chunk("".join(self._pieces), lists, self._finish_reason)

    def _chunk(self, text: str, lists: dict[str, Any] | None, finish_reason: FinishReason | None) -> dict[str, Any]:
        return {"index": self.index, "text": text, "logprobs": lists, "finish_reason": finish_reason}


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The lists of several pieces as those of one text."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {
        name: None if any(part[name] is None for part in parts) else [item for part in parts for item in part[name]]
        for name in names
    }
