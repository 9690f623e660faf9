"""What the stages that train a model share: sample texts on the way, and the model folder at the end."""

import shutil
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from groundup.base.artifacts import LOGS
from groundup.base.errors import UserError
from groundup.base.generation import SamplingParams
from groundup.base.seeds import derive_seed
from groundup.infer.engine import Engine
from groundup.model.checkpoint import Checkpoint, save_checkpoint
from groundup.model.config import num_parameters
from groundup.model.transformer import Transformer
from groundup.stages.job import Job
from groundup.train.config import TrainConfig
from groundup.train.loop import FitResult, Sample
from groundup.train.parallel import connect, unsharded

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TrainStageConfig(TrainConfig):
    """Keys of every stage that trains a language model."""

    evaluate_rows: int | None = Field(
        default=256, gt=0, description="held-out rows used for each evaluation; null: all"
    )
    sample_tokens: int = Field(default=64, gt=0, description="tokens of a sample text")
    sample_temperature: float = Field(
        default=0.7, ge=0, description="of the sample texts; 0: the likeliest token each time"
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of the weights in the model folder"
    )


def text_sampler(
    config: TrainStageConfig,
    job: Job,
    checkpoint: Checkpoint,
    prompts: Sequence[tuple[str, list[int]]],
    stop_ids: Sequence[int],
) -> Sample:
    """A `sample` for `fit`: continues prompts (what the user reads, ids) with the same random numbers each time.

    Raises: `UserError` for a prompt that leaves no room in the context, now and not hours later.
    """
    context = checkpoint.config.max_positions
    for text, ids in prompts:
        if len(ids) >= context:
            raise UserError(
                f"{job.name}: the sample prompt {text!r} has {len(ids)} tokens, the model's context {context}",
                "give a shorter one",
            )
    params = SamplingParams(
        max_new_tokens=config.sample_tokens,
        temperature=config.sample_temperature,
        top_p=0.95,
        seed=derive_seed(job.seed, "sample"),
        stop_ids=tuple(stop_ids),
    )
    longest = max(len(ids) for _, ids in prompts) + config.sample_tokens

    def sample(model: Transformer, step: int) -> str:
        whole = unsharded(model)
        if not connect().is_first:
            return ""
        engine = Engine(whole, checkpoint.tokenizer, max_slots=len(prompts), max_tokens=min(longest, context))
        answers = engine.generate([ids for _, ids in prompts], params)
        pairs = zip(prompts, answers, strict=True)
        return "\n".join(f"{text} -> {answer[0].text.strip()}" for (text, _), answer in pairs)

    return sample


def write_model(job: Job, config: TrainStageConfig, checkpoint: Checkpoint, result: FitResult) -> dict[str, Any]:
    """Put the trained model and the logs into the artifact (rank 0); returns the manifest's metrics."""
    model = unsharded(checkpoint.model)
    if connect().is_first:
        whole = Checkpoint(model.cpu(), checkpoint.config, checkpoint.tokenizer, checkpoint.chat, checkpoint.generation)
        save_checkpoint(job.out, whole, dtype=_DTYPES[config.save_dtype])
        shutil.copytree(job.work / LOGS, job.out / LOGS)
    return {"parameters": num_parameters(checkpoint.config), **result.summary()}
