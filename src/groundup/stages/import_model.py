"""Stage `import`: a model that others trained -> the base artifact, an ordinary Hugging Face folder."""

from pathlib import Path
from typing import Any, Literal

import torch

from groundup.base.config import Config
from groundup.base.errors import UserError
from groundup.data.sources import find_source, get_source, nearest_source
from groundup.model.checkpoint import load_checkpoint, save_checkpoint
from groundup.model.config import num_parameters
from groundup.stages.job import Job

VERSION = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ImportConfig(Config):
    """Which model to start from."""

    source: str
    """Folder or file (Hugging Face, Meta, GGUF, llama2.c), or a model's name in the catalogue (groundup data list)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights as written."""


def raw_inputs(config: ImportConfig) -> list[Path]:
    """The model, unless the catalogue pins it."""
    path = Path(config.source).expanduser()
    if path.exists():
        return [path]
    if find_source(config.source) is None:
        raise UserError(
            f"import.source = {config.source!r}: no such file or folder, and no such model in the catalogue"
            f"{nearest_source(config.source)}",
            "give a model's folder or file, or a name that `groundup data list` shows with kind model",
        )
    return []


def run(config: ImportConfig, job: Job) -> dict[str, Any]:
    """Load, check and write the model; returns its size."""
    local = raw_inputs(config)
    path = local[0] if local else get_source(config.source)
    checkpoint = load_checkpoint(path)
    save_checkpoint(job.out, checkpoint, dtype=DTYPES[config.dtype])
    return {
        "parameters": num_parameters(checkpoint.config),
        "vocab_size": checkpoint.config.vocab_size,
        "chat_format": checkpoint.chat.name,
        "imported_from": str(path) if local else config.source,
    }
