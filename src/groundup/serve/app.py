"""The application: routes, errors in OpenAI's shape, and what stands around them."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from starlette.exceptions import HTTPException

from groundup.base.errors import UserError
from groundup.infer.grammar import Grammars
from groundup.serve.backend import Backend, NotImplementedByEngine, RequestFailed, Unavailable
from groundup.serve.chat_completions import chat_router
from groundup.serve.completions import completions_router
from groundup.serve.config import MAX_BODY_BYTES, ServeConfig
from groundup.serve.embeddings import embeddings_router
from groundup.serve.generation import Service
from groundup.serve.metrics import Metrics
from groundup.serve.page_routes import PAGE_PATHS, page_router
from groundup.serve.request_log import RequestLog
from groundup.serve.wire import CLIENT_GONE, ApiError, ClientGone, JsonResponse, as_api_error
from groundup.web.guard import Guard, local_hosts

PUBLIC = PAGE_PATHS | {"/health"}
"""What may be read without a key: the page's files, and whether the server lives."""


def create_app(models: Mapping[str, Backend], config: ServeConfig) -> FastAPI:
    """Everything behind one port, for models by the names that requests give; it closes them at its end."""
    assert models, "there is nothing to serve"
    metrics = Metrics(models)
    grammars = {backend.name: Grammars(backend.tokenizer) for backend in models.values()}
    service = Service(models, metrics, grammars)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        backends = {backend.name: backend for backend in models.values()}
        await asyncio.gather(*(backend.close(config.drain_seconds) for backend in backends.values()))
        for each in grammars.values():
            each.close()

    app = FastAPI(
        title="groundup", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    for router in (
        chat_router(service),
        completions_router(service),
        embeddings_router(service),
        _models_router(service),
        _health_router(service),
        page_router(),
    ):
        app.include_router(router)
    for kind in (ApiError, UserError, Unavailable, NotImplementedByEngine, RequestFailed):
        app.add_exception_handler(kind, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientGone, _answer_nobody)
    app.add_middleware(
        Guard,
        hosts=(*local_hosts(config.host), *config.allow_hosts),
        max_body_bytes=MAX_BODY_BYTES,
        keys=config.api_keys,
        public=PUBLIC,
    )
    app.add_middleware(RequestLog, metrics=metrics)
    return app


def _models_router(service: Service) -> APIRouter:
    router = APIRouter()

    def describe(name: str) -> dict[str, Any]:
        backend = service.model(name)
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "groundup",
            "context_length": backend.max_tokens,
        }

    @router.get("/v1/models")
    async def list_models() -> Response:
        return JsonResponse({"object": "list", "data": [describe(name) for name in service.models]})

    @router.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        return JsonResponse(describe(name))

    return router


def _health_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """Choice: one model that cannot answer makes the whole server ill, so that whoever watches it sees it."""
        problems = {name: backend.health() for name, backend in service.models.items()}
        is_well = not any(problems.values())
        body = {"status": "ok" if is_well else "unavailable", "models": {n: p or "ok" for n, p in problems.items()}}
        return JsonResponse(body, 200 if is_well else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _answer_error(request: Request, error: Exception) -> Response:
    return as_api_error(error).response()


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: a path or a method that does not exist."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{error.detail}: see docs/serve.md for the routes").response()


async def _answer_nobody(request: Request, error: Exception) -> Response:
    """For the log only: nothing that is sent now arrives."""
    return Response(status_code=CLIENT_GONE)
