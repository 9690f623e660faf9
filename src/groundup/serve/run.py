"""What `groundup serve` does: models are opened, each once, and answer until the server is stopped."""

import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from groundup.base.artifacts import MANIFEST
from groundup.base.errors import UserError
from groundup.base.progress import say
from groundup.infer.engine import Engine
from groundup.infer.quantize import weights_form
from groundup.model.checkpoint import load_checkpoint
from groundup.serve.app import create_app
from groundup.serve.backend import Backend
from groundup.serve.config import ServeConfig
from groundup.serve.engine_backend import EngineBackend
from groundup.serve.llama_cpp_backend import open_llama_cpp
from groundup.serve.vllm_backend import open_vllm
from groundup.stages.models import resolve_model
from groundup.web.run import make_server

ENGINES = ("groundup", "llama.cpp", "vllm")


@dataclass(frozen=True)
class EngineOptions:
    """What runs each model, and how much of it at a time."""

    engine: str = "groundup"
    weights: str = "as is"
    slots: int = 32
    queue: int = 256
    max_tokens: int | None = None
    """Of the context; None: the model's own."""


def serve(
    models: Sequence[str], names: Sequence[str], config: ServeConfig, options: EngineOptions, *, port: int
) -> None:
    """Serve models until a signal; `names` are NAME=MODEL.

    Raises: UserError for what cannot be served, before anything is loaded where that is possible.
    """
    if options.engine not in ENGINES:
        raise UserError(f"engine = {options.engine!r} is not known", f"use {', '.join(ENGINES)}")
    weights_form(options.weights)
    paths = named_models(models, names)
    app = _Later()
    # The address is taken first: that it is not free is told before minutes of loading, and who comes early waits.
    server = make_server(
        app, config.host, port, is_protected=bool(config.api_keys), on_started=lambda url: _announce(url, list(paths))
    )
    _log_to_stderr()
    opened: dict[Path, Backend] = {}
    for name, path in paths.items():
        if path not in opened:
            say(f"loading {name} from {path}")
            opened[path] = open_backend(name, path, options)
    app.app = create_app({name: opened[path] for name, path in paths.items()}, config)
    server.run()


def named_models(models: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """Name -> file or folder. Choice: a model without a name has that of its folder; an artifact of a run also the
    run's, as in quickstart/sft-v2."""
    found: dict[str, Path] = {}
    for item in [*models, *names]:
        name, equals, text = item.partition("=") if item in names else ("", "", item)
        if item in names and not (equals and name and text):
            raise UserError(f"--name {item!r} is not of the form NAME=MODEL")
        path = resolve_model(text).resolve()
        if not name:
            name = f"{path.parent.name}/{path.name}" if (path / MANIFEST).exists() else path.name
        if name in found and found[name] != path:
            raise UserError(f"two models are called {name!r}", "give one of them another name with --name NAME=MODEL")
        found[name] = path
    if not found:
        raise UserError("there is no model to serve", "name one: groundup serve runs/quickstart")
    return found


def read_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys in a file, one a line, or the one in GROUNDUP_API_KEY.

    Why no option takes a key: command lines are seen by every user of a machine.
    """
    if file is not None:
        keys = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        if not keys:
            raise UserError(f"{file}: holds no key", "write one key a line into it")
    else:
        keys = tuple(filter(None, [environment.get("GROUNDUP_API_KEY", "").strip()]))
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UserError("an API key may hold printable ASCII characters only, and no spaces")
    return keys


def open_backend(name: str, path: Path, options: EngineOptions) -> Backend:
    """A model on the engine that was asked for."""
    form, slots, queue, max_tokens = weights_form(options.weights), options.slots, options.queue, options.max_tokens
    if options.engine == "llama.cpp":
        return open_llama_cpp(path, name, slots=slots, queue=queue, max_tokens=max_tokens, weights=form)
    if options.engine == "vllm":
        return open_vllm(path, name, slots=slots, queue=queue, max_tokens=max_tokens, weights=form)

    def load() -> EngineBackend:
        checkpoint = load_checkpoint(path)
        context = min(max_tokens or checkpoint.config.max_positions, checkpoint.config.max_positions)
        engine = Engine(checkpoint.model, checkpoint.tokenizer, max_slots=slots, max_tokens=context, weights=form)
        return EngineBackend(name, engine, checkpoint.tokenizer, checkpoint.chat, checkpoint.generation, queue=queue)

    with ThreadPoolExecutor(1) as thread:  # one that ends: see `engine_backend.IDLE_SECONDS`
        return thread.submit(load).result()


class _Later:
    """The application, once there is one; no request is read before."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


def _announce(url: str, names: Sequence[str]) -> None:
    print(f"chat page: {url}/\nAPI:       {url}/v1\nmodels:    {', '.join(names)}", flush=True)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    for name, level in (("groundup", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
