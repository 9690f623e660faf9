"""The curation rules that look at one document alone, run here or in worker processes, in order either way."""

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context

from rensa import RMinHash

from groundup.base.records import Document
from groundup.data.dedup import minhash, text_hash
from groundup.data.filters import LanguageFilter, QualityConfig, QualityFilter, normalise

_BATCH_CHARS = 1 << 20
_POOL_PAYS_FROM_BYTES = 8 << 20
_BOUNDARIES = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"[.!?][\"')\]”’]*\s"), re.compile(r"\s"))
"""Ends of a paragraph, a line, a sentence, a word."""


@dataclass(frozen=True)
class Rules:
    """What the judge goes by; see `CurateConfig` for the meaning."""

    languages: tuple[str, ...]
    min_language_score: float
    quality: QualityConfig | None
    finds_near_duplicates: bool
    max_document_chars: int


@dataclass(frozen=True)
class Judged:
    """A document as it comes out of the rules that look at it alone."""

    document: Document
    """With normalised text."""
    was_mended: bool
    reason: str | None = None
    """Why all of it is dropped."""
    digest: bytes = b""
    signature: RMinHash | None = None
    parts: tuple[tuple[str, str | None], ...] = ()
    """(text, why it is dropped) of the parts it is cut into."""


class Judge:
    """Made once in each process, since it loads the language model."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._language = LanguageFilter(rules.languages, rules.min_language_score)
        self._quality = QualityFilter(rules.quality) if rules.quality else None

    def __call__(self, document: Document) -> Judged:
        text = normalise(document.text).strip()
        was_mended = text != document.text.strip()
        document = replace(document, text=text)
        reason = self._language.reason_to_drop(text) if text else "empty"
        if reason:
            return Judged(document, was_mended, reason)
        parts = [
            (part, self._quality.reason_to_drop(part) if self._quality else None)
            for part in split_text(text, self._rules.max_document_chars)
        ]
        signature = minhash(text) if self._rules.finds_near_duplicates else None
        return Judged(document, was_mended, None, text_hash(text), signature, tuple(parts))


def split_text(text: str, limit: int) -> list[str]:
    """Parts of at most `limit` characters, cut at the last paragraph, else line, else sentence, else word that fits."""
    parts, start = [], 0
    while len(text) - start > limit:
        # Only the second half of what fits is searched: a part should not be cut short to end well.
        at = start + limit
        for boundary in _BOUNDARIES:
            ends = [match.end() for match in boundary.finditer(text, start + limit // 2, start + limit)]
            if ends:
                at = ends[-1]
                break
        parts.append(text[start:at])
        start = at
    return [stripped for part in (*parts, text[start:]) if (stripped := part.strip())]


@contextmanager
def judging(
    rules: Rules, workers: int | None, total_bytes: int | None
) -> Iterator[Callable[[Iterable[Document]], Iterator[Judged]]]:
    """A function from documents to judged documents in the same order.

    `workers` None: this process below 8 MB, where a pool costs more than it gives, else a process a core.
    """
    if workers is None:
        pays = total_bytes is None or total_bytes > _POOL_PAYS_FROM_BYTES
        workers = (os.cpu_count() or 1) if pays else 1
    if workers == 1:
        judge = Judge(rules)
        yield lambda documents: map(judge, documents)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (rules,)) as pool:
        yield lambda documents: _judge_in_pool(pool, documents, 2 * workers)


def _judge_in_pool(pool: ProcessPoolExecutor, documents: Iterable[Document], max_waiting: int) -> Iterator[Judged]:
    batches, waiting = _batches(documents), deque[Future[list[Judged]]]()
    while True:
        waiting.extend(pool.submit(_judge_batch, batch) for batch in islice(batches, max_waiting - len(waiting)))
        if not waiting:
            return
        yield from waiting.popleft().result()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_judge_of_worker: Judge


def _start_worker(rules: Rules) -> None:
    global _judge_of_worker
    _judge_of_worker = Judge(rules)


def _judge_batch(documents: list[Document]) -> list[Judged]:
    return [_judge_of_worker(document) for document in documents]
