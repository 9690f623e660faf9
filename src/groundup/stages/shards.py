"""Stage `shards`: corpus and tokenizer -> token shards, what pre-training reads."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from groundup.base.config import Config
from groundup.base.errors import UserError
from groundup.data.curate import HELD_OUT, TRAIN, read_corpus
from groundup.data.shards import write_index, write_split
from groundup.stages.job import Job
from groundup.text.tokenizer import load_tokenizer

VERSION = 1


class ShardsConfig(Config):
    """How token shards are cut."""

    shard_tokens: int = Field(100_000_000, gt=0)
    """A shard is closed at the first document end from here on; a killed run loses at most one shard of work."""


def run(config: ShardsConfig, job: Job) -> dict[str, Any]:
    """Fill the shards artifact; metrics are the counts of both splits and `tokens`, their sum."""
    corpus = job.inputs["corpus"]
    tokenizer = load_tokenizer(job.inputs["tokenizer"].path)
    splits = {}
    for split, name in (("train", TRAIN), ("held_out", HELD_OUT)):
        texts = _texts(corpus.file(name))
        splits[split] = write_split(
            texts, tokenizer, job.work / split, shard_tokens=config.shard_tokens, description=f"tokenize {split}"
        )
        _publish(job.work / split, job.out / split)
    if not splits["train"]:
        raise UserError(f"{corpus.path}: the training split is empty", "change what the curate section keeps")
    write_index(job.out, tokenizer, splits)
    metrics: dict[str, Any] = {
        split: {
            "documents": sum(shard.num_documents for shard in shards),
            "tokens": sum(shard.num_tokens for shard in shards),
            "text_bytes": sum(shard.text_bytes for shard in shards),
        }
        for split, shards in splits.items()
    }
    return {**metrics, "tokens": sum(counts["tokens"] for counts in metrics.values())}


def _texts(path: Path) -> Iterator[str]:
    return (document.text for document in read_corpus(path))


def _publish(finished: Path, out: Path) -> None:
    """Give the arrays a second name in `out`, so that a kill before publishing loses none and no byte is copied."""
    out.mkdir()
    for path in sorted(finished.glob("*.npy")):
        try:
            os.link(path, out / path.name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, out / path.name)
