"""llama.cpp behind the API, through xllamacpp: its server runs in this process, on a loopback port with a random key.

The checkpoint is converted to GGUF once, with a vocabulary of plain words in place of its own.
Why: only ids cross the border. With the model's vocabulary llama.cpp would give only the last id of a character that is
made of several tokens, and end a response at texts that look like an end of turn; ours ends by ids.
"""

import importlib.util
import json
import secrets
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import torch

from groundup.base.errors import UserError
from groundup.base.generation import SamplingParams
from groundup.infer.quantize import Weights
from groundup.model.checkpoint import load_checkpoint, open_checkpoint
from groundup.model.weights.gguf import Quantisation, save_gguf
from groundup.serve.backend import NotImplementedByEngine, RequestFailed, Unavailable
from groundup.serve.other_engine import OtherEngine, Served, Tokens, cached_path, truncation

_OF_DTYPE: dict[torch.dtype, Quantisation] = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_OF_WEIGHTS: dict[Weights, Quantisation] = {"bf16": "bf16", "fp32": "f32", "int8": "q8_0"}
_NORMAL_TOKEN, _CONTROL_TOKEN = 1, 3
_RANDOM_SEEDS = 2**32 - 1
"""llama.cpp's seeds are below; this one means "draw one"."""


class LlamaCppBackend(OtherEngine):
    """A model served by llama.cpp."""

    engine_name = "llama.cpp"

    def __init__(self, served: Served, model: Path, *, slots: int, queue: int) -> None:
        super().__init__(served, slots=slots, queue=queue)
        xllamacpp, self._httpx = importlib.import_module("xllamacpp"), importlib.import_module("httpx")
        key = secrets.token_urlsafe(32)
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_parallel, params.n_ctx = slots, slots * served.max_tokens
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.port, params.api_keys = 0, [key]
        params.ui = params.endpoint_slots = params.endpoint_props = False
        params.verbosity = -1
        self._server = xllamacpp.Server(params)
        self._client = self._httpx.AsyncClient(
            base_url=self._server.listening_address,
            headers={"Authorization": f"Bearer {key}"},
            timeout=self._httpx.Timeout(None),
            # A connection that is kept open would keep one of the few threads that answer.
            limits=self._httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,  # no proxy between us and this process
        )
        self._problem: str | None = None

    async def generate(
        self, prompt: list[int], params: SamplingParams, seed: int, limit: int
    ) -> AsyncGenerator[Tokens]:
        try:
            async with self._client.stream("POST", "/completion", json=_body(prompt, params, seed, limit)) as reply:
                if reply.status_code != 200:
                    raise RequestFailed(f"llama.cpp refused the request (status {reply.status_code})")
                self._problem = None
                async for line in reply.aiter_lines():
                    event = _event(line)
                    if event is not None and event["tokens"]:
                        yield _tokens(event, params.top_logps)
        except self._httpx.TransportError as error:
            self._problem = f"llama.cpp does not answer ({type(error).__name__})"
            raise Unavailable(self._problem) from None

    def engine_problem(self) -> str | None:
        return self._problem

    async def shut_down(self) -> None:
        await self._client.aclose()
        del self._server


def open_llama_cpp(
    path: Path, name: str, *, slots: int, queue: int, max_tokens: int | None = None, weights: Weights = "as is"
) -> LlamaCppBackend:
    """Serve the model at `path` with llama.cpp; the first time it is converted.

    Raises: UserError when xllamacpp is not installed, or cannot hold these weights.
    """
    if any(importlib.util.find_spec(package) is None for package in ("xllamacpp", "httpx")):
        raise UserError("the engine llama.cpp is not installed", "pip install xllamacpp httpx")
    opened, tokenizer, chat = open_checkpoint(path)
    if weights != "as is" and weights not in _OF_WEIGHTS:
        raise UserError(f"weights = {weights}: not for llama.cpp", f"use as is, {', '.join(_OF_WEIGHTS)}")
    quantisation = _OF_DTYPE[opened.dtype] if weights == "as is" else _OF_WEIGHTS[weights]
    model = cached_path(path, "gguf", f"-{quantisation}.gguf")
    if not model.exists():
        model.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = load_checkpoint(path)
        vocabulary = _vocabulary(checkpoint.config.vocab_size, tokenizer.bos_id, tokenizer.eos_id)
        state = checkpoint.model.state_dict()
        save_gguf(model, checkpoint.config, state, vocabulary, name=path.name, quantisation=quantisation)
    config = opened.config
    served = Served(
        name, tokenizer, chat, opened.generation, config.vocab_size, min(max_tokens or 2**31, config.max_positions)
    )
    return LlamaCppBackend(served, model, slots=slots, queue=queue)


def _vocabulary(size: int, bos_id: int, eos_id: int) -> dict[str, Any]:
    """The least that llama.cpp asks for; no two tokens alike, no character cut in two."""
    controls = {bos_id, eos_id}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [f"t{token} " for token in range(size)],
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.token_type": [_CONTROL_TOKEN if token in controls else _NORMAL_TOKEN for token in range(size)],
        "tokenizer.ggml.bos_token_id": bos_id,
        "tokenizer.ggml.eos_token_id": eos_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }


def _body(prompt: list[int], params: SamplingParams, seed: int, limit: int) -> dict[str, Any]:
    if params.frequency_penalty or params.presence_penalty:
        # Its penalties count the prompt's tokens too.
        raise NotImplementedByEngine("llama.cpp has no frequency or presence penalty as OpenAI defines them")
    top_k, top_p = truncation(params)
    return {
        "prompt": prompt,
        "n_predict": limit,
        "temperature": params.temperature,
        "top_k": top_k,
        "top_p": top_p,
        "samplers": ["temperature", "top_k", "top_p"],
        "seed": seed % _RANDOM_SEEDS,
        "logit_bias": [[token, bias] for token, bias in params.logit_bias],
        "n_probs": max(params.top_logps, 1) if params.want_logps or params.top_logps else 0,
        "return_tokens": True,
        "stream": True,
        "cache_prompt": True,
    }


def _event(line: str) -> dict[str, Any] | None:
    """A server-sent event. Raises: RequestFailed for one that tells of an error."""
    name, _, value = line.partition(":")
    if name not in ("data", "error"):
        return None
    event = json.loads(value)
    if name == "error" or "error" in event:
        raise RequestFailed("llama.cpp failed on this request")
    return dict(event)


def _tokens(event: dict[str, Any], top: int) -> Tokens:
    places = event.get("completion_probabilities", [])
    best = [[(int(other["id"]), float(other["logprob"])) for other in place["top_logprobs"]] for place in places]
    return Tokens(
        [int(token) for token in event["tokens"]],
        [float(place["logprob"]) for place in places],
        [pairs[:top] for pairs in best] if top else [],
    )
