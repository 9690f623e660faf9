"""Stage `tokenizer`: the corpus, or an existing tokenizer -> the tokenizer artifact."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from groundup.base.artifacts import Artifact
from groundup.base.config import Config
from groundup.base.progress import say
from groundup.base.seeds import derive_seed
from groundup.data.curate import HELD_OUT, TRAIN, read_corpus
from groundup.stages.job import Job
from groundup.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

VERSION = 1
_MEASURED_DOCUMENTS = 1000
_PIECE_CHARS = 10_000


class TokenizerConfig(Config):
    """How the vocabulary is made."""

    vocab_size: int = Field(32_000, gt=260)
    """Including <unk>, <s>, </s> and the 256 bytes. Source: section 2.2."""
    sample_chars: int = Field(100_000_000, ge=1_000_000)
    """Train on a random sample of about so many characters; SentencePiece holds them in memory, several times over."""
    source: Path | None = None
    """Use this tokenizer (a file or a folder) instead of training one; vocab_size is then the file's own."""


def raw_inputs(config: TokenizerConfig) -> list[Path]:
    """The tokenizer that the config names."""
    return [] if config.source is None else [config.source.expanduser()]


def run(config: TokenizerConfig, job: Job) -> dict[str, Any]:
    """Fill the tokenizer artifact; metrics are its size and the bytes a token stands for, on held-out text."""
    corpus = job.inputs["corpus"]
    if config.source is not None:
        tokenizer = load_tokenizer(config.source.expanduser())
        tokenizer.save(job.out)
    else:
        texts = _sample(corpus, config.sample_chars, job.seed)
        tokenizer = train_tokenizer(texts, config.vocab_size, job.out, job.seed)
    metrics = {"vocab_size": tokenizer.vocab_size, "bytes_per_token": bytes_per_token(tokenizer, corpus)}
    say(f"tokenizer of {tokenizer.vocab_size} pieces, {metrics['bytes_per_token']:.2f} bytes per token")
    return metrics


def bytes_per_token(tokenizer: Tokenizer, corpus: Artifact) -> float:
    """UTF-8 bytes per token over the first held-out documents, or training documents if none is held out."""
    for name in (HELD_OUT, TRAIN):
        texts = [document.text for document in islice(read_corpus(corpus.file(name)), _MEASURED_DOCUMENTS)]
        num_tokens = sum(map(len, tokenizer.encode_many(texts)))
        if num_tokens:
            return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / num_tokens
    raise AssertionError("a corpus has text")


def _sample(corpus: Artifact, sample_chars: int, seed: int) -> Iterator[str]:
    """The training split if it is short enough, else pieces of it, drawn so that about `sample_chars` come together.

    Why: the first documents of a corpus all come from its first source, and one document may be most of a corpus.
    """
    texts = (document.text for document in read_corpus(corpus.file(TRAIN)))
    share = sample_chars / corpus.metrics["train"]["characters"]
    if share >= 1:
        yield from texts
        return
    pieces = (text[at : at + _PIECE_CHARS] for text in texts for at in range(0, len(text), _PIECE_CHARS))
    for number, piece in enumerate(pieces):
        if derive_seed(seed, "sample", number) / 2**63 < share:
            yield piece
