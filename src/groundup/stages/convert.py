"""What `groundup convert` does: check the words of the command line, then write the model."""

from pathlib import Path
from typing import get_args

import torch

from groundup.base.errors import UserError
from groundup.model.checkpoint import Format, convert
from groundup.model.weights.gguf import Quantisation

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert_model(
    source: Path,
    target: Path,
    to: str,
    *,
    dtype: str | None,
    shards: int | None,
    quantisation: str | None,
    tokenizer: Path | None,
) -> None:
    """Write the model at `source` to `target`; options that the format does not have are an error."""
    for option, value, known in (
        ("--to", to, get_args(Format)),
        ("--dtype", dtype, tuple(DTYPES)),
        ("--quantisation", quantisation, get_args(Quantisation)),
    ):
        if value is not None and value not in known:
            raise UserError(f"{option} {value!r} is not known", f"one of: {', '.join(known)}")
    convert(
        source,
        target,
        to,  # type: ignore[arg-type]  # compared with the known words above
        dtype=DTYPES[dtype] if dtype else None,
        shards=shards,
        quantisation=quantisation,  # type: ignore[arg-type]
        tokenizer=tokenizer,
    )
