"""Tokenizer training and corpus encoding against sentencepiece and tokenizers, in one interleaved run.

    python benchmarks/tokenizer.py [--text FILE] [--vocab-size 32000]

Each round runs every contender once, so that all meet the same state of the machine; the tables give medians and
extremes. Texts never repeat between rounds: encoding the same text again would measure caches. Ids are compared on
every text.
"""

import argparse
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from groundup.text.tokenizer import load_tokenizer, train_tokenizer

TRAIN_BYTES = 20_000_000
ROUND_BYTES = 4_000_000
DOCUMENT_CHARACTERS = 4096
DEFAULT_TEXT = Path(__file__).resolve().parents[1] / "../shared/data/text/classic-books.jsonl.gz"


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a .jsonl file (field `text`) or of a plain text file, either of them gzipped or not."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if ".jsonl" in path.name:
            for line in file:
                yield json.loads(line)["text"]
        else:
            yield file.read()


def take(texts: Iterator[str], size_bytes: int) -> list[str]:
    """Documents of the next `size_bytes` bytes."""
    taken: list[str] = []
    left = size_bytes
    while left > 0:
        text = next(texts, None)
        if text is None:
            sys.exit(f"the text is too short: {left:,} bytes more are needed")
        taken.append(text)
        left -= len(text.encode())
    return taken


def documents(texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), DOCUMENT_CHARACTERS):
            yield text[start : start + DOCUMENT_CHARACTERS]


def train_tokenizers(texts: list[str], vocab_size: int) -> None:
    """The peer's nearest equivalent: BPE with byte fallback over words that start with a space."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Prepend("\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def benchmark_training(texts: list[str], vocab_size: int, rounds: int, folder: Path) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {"groundup": [], "tokenizers": []}
    for _ in range(rounds):
        seconds["groundup"].append(timed(lambda: train_tokenizer(texts, vocab_size, folder, seed=0))[0])
        seconds["tokenizers"].append(timed(lambda: train_tokenizers(texts, vocab_size))[0])
    return seconds


def encoders(
    reference: sentencepiece.SentencePieceProcessor, folder: Path, batch: list[str]
) -> dict[str, Callable[[], list[Any]]]:
    """Who encodes `batch`. New objects each round, so that none keeps pieces of earlier texts; nobody's set-up is
    timed."""
    threads = os.cpu_count() or 1
    ours, hf = load_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours.encode_many(["warm-up"])
    hf.encode_special_tokens = True
    return {
        "sentencepiece, 1 thread": lambda: reference.encode(batch, num_threads=1),
        f"sentencepiece, {threads} threads": lambda: reference.encode(batch, num_threads=threads),
        f"tokenizers, batch, {threads} threads": lambda: [
            row.ids for row in hf.encode_batch_fast(batch, add_special_tokens=False)
        ],
        "groundup encode_many": lambda: ours.encode_many(batch),
    }


def benchmark_encoding(stream: Iterator[str], rounds: int, folder: Path) -> tuple[dict[str, list[float]], int]:
    """MB/s of each contender by round, and the number of texts whose ids were compared (all equal, or it exits)."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    rates: dict[str, list[float]] = {}
    compared = 0
    for _ in range(rounds):
        batch = take(stream, ROUND_BYTES)
        size = sum(len(text.encode()) for text in batch) / 1e6
        contenders = encoders(reference, folder, batch)
        results = {}
        for name, action in contenders.items():
            seconds, results[name] = timed(action)
            rates.setdefault(name, []).append(size / seconds)
        expected = results["sentencepiece, 1 thread"]
        for text, ids, row in zip(batch, expected, results["groundup encode_many"], strict=True):
            if row.tolist() != ids:
                sys.exit(f"ids differ from sentencepiece's on {text[:200]!r}")
        compared += len(batch)
    return rates, compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT)
    parser.add_argument("--vocab-size", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    texts = read_texts(arguments.text)
    corpus = take(texts, TRAIN_BYTES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = benchmark_training(corpus, arguments.vocab_size, 3, folder)
        rates, compared = benchmark_encoding(documents(texts), arguments.rounds, folder)
    print(f"Training, {TRAIN_BYTES / 1e6:.0f} MB, {arguments.vocab_size} pieces, {os.cpu_count()} cores\n")
    print("| | s, median (min-max) |\n|---|---|")
    for contender, values in seconds.items():
        print(f"| {contender} | {spread(values, 2)} |")
    base = rates["sentencepiece, 1 thread"]
    print(
        f"\nEncoding new text, {arguments.rounds} rounds of {ROUND_BYTES / 1e6:.0f} MB; ids equal on {compared} texts\n"
    )
    print("| | MB/s, median (min-max) | times sentencepiece, 1 thread |\n|---|---|---|")
    for contender, values in rates.items():
        ratios = [value / one for value, one in zip(values, base, strict=True)]
        print(f"| {contender} | {spread(values, 1)} | {spread(ratios, 1)} |")


if __name__ == "__main__":
    main()
