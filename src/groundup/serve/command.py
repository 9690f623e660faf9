"""The command `groundup serve`: its options. Nothing heavy is imported before it runs."""

import os
from pathlib import Path
from typing import Annotated

import typer

from groundup.base.extras import need_extra


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Models as for chat, called by their folders.", show_default=False),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="NAME=MODEL", help="A model by a name; may be repeated.", show_default=False),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; others than loopback need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="Keys that requests must carry, one a line (or one key in GROUNDUP_API_KEY).",
            show_default=False,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="A further name of this server; may be repeated.", show_default=False
        ),
    ] = None,
    engine: Annotated[str, typer.Option("--engine", help="groundup, llama.cpp or vllm.")] = "groundup",
    weights: Annotated[str, typer.Option("--weights", help="as is, fp32, bf16, int8 or int4.")] = "as is",
    slots: Annotated[int, typer.Option("--slots", min=1, max=1024, help="Most responses written at a time.")] = 32,
    queue: Annotated[int, typer.Option("--queue", min=0, max=100_000, help="Most responses that may wait.")] = 256,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=2, help="Context, answer included (default: the model's).", show_default=False
        ),
    ] = None,
) -> None:
    """Serve models: an OpenAI-compatible API and a chat page."""
    need_extra("serve", "fastapi", "uvicorn", "llguidance", "prometheus_client", "markdown_it", "nh3")
    from groundup.serve.config import ServeConfig
    from groundup.serve.run import EngineOptions, read_keys
    from groundup.serve.run import serve as run_server

    config = ServeConfig(host=host, api_keys=read_keys(api_key_file, os.environ), allow_hosts=tuple(allow_host or ()))
    options = EngineOptions(engine=engine, weights=weights, slots=slots, queue=queue, max_tokens=max_tokens)
    run_server(models or [], name or [], config, options, port=port)
