"""POST /v1/embeddings."""

import base64

import numpy as np
from fastapi import APIRouter, Request, Response

from groundup.serve.backend import Backend
from groundup.serve.generation import USAGE, Service, Usage, encode_input, room_for
from groundup.serve.schemas import EmbeddingRequest, parse_request
from groundup.serve.wire import ApiError, JsonResponse, parse_json, until_disconnect


def embeddings_router(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(http: Request) -> Response:
        request = parse_request(EmbeddingRequest, parse_json(await http.body()))
        backend = service.model(request.model)
        return await until_disconnect(http.receive, _answer(service, backend, request, http))

    return router


async def _answer(service: Service, backend: Backend, request: EmbeddingRequest, http: Request) -> Response:
    if "" in request.input:
        raise ApiError(400, "input: an empty text has no embedding", param="input", code="invalid_value")
    rows = [encode_input(item, backend, "input") for item in request.input]
    for row in rows:
        room_for(row, None, backend, "input")
    vectors = await backend.embed(rows)
    if request.dimensions not in (None, len(vectors[0])):
        raise ApiError(400, f"the vectors of this model have {len(vectors[0])} dimensions", param="dimensions")
    usage = http.scope[USAGE] = Usage(sum(len(row) for row in rows))
    service.metrics.prompt_tokens.labels(backend.name).inc(usage.prompt_tokens)
    return JsonResponse(
        {
            "object": "list",
            "model": backend.name,
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "usage": {"prompt_tokens": usage.prompt_tokens, "total_tokens": usage.prompt_tokens},
        }
    )


def _encoded(vector: list[float], encoding: str | None) -> list[float] | str:
    """base64 is that of little-endian float32, which the official clients ask for unless told otherwise."""
    if encoding == "base64":
        return base64.b64encode(np.array(vector, dtype="<f4").tobytes()).decode()
    return vector
