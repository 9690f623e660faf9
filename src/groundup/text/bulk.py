"""Encoding whole corpora on all cores."""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

try:
    import fastokens
except ImportError:  # no wheel for this machine: the caller's own library does the work, with the same ids
    fastokens = None

_BYTE_NAME = re.compile("<0x[0-9A-F]{2}>")
# Spaces everywhere, literal U+2581, control strings, digits, bytes, periodic runs, joined emoji, unassigned characters.
_PROBES = (
    "", " ", "  two  spaces ", "line\n\n next\r\n\tend", "\u2581literal\u2581", "<s>a</s><unk><0x0A><|im_end|>[INST]",
    "Numbers 1234567, 3.14 and 2nd", "it's DON'T we'll", "aaaaaaa ababababa -=-=-=-=- ......",
    "\0\x01\x7f\u0085\u3000\ufeff",
    "naïve cafe\u0301 Ünïcödé ß", "日本語と한국어 العربية हिन्दी", "👩‍👩‍👧 😀😀 🏳️‍🌈", "\U0010ffff\ue000\ufffd",
)  # fmt: skip


def bulk_encoder(
    tokenizer_json: str, encode: Callable[[str], list[int]]
) -> Callable[[Sequence[str]], list[np.ndarray]] | None:
    """A function that encodes many texts, several times faster than sentencepiece; None where it cannot be used.

    Why: fastokens finds pieces by their spelling. Where a vocabulary lacks the characters of a control token's name, it
    takes that name in a text for the token, so such a vocabulary is left to the slower library, as is any that fails
    the probes. The ids come back as int32 views of one buffer: making Python integers would take most of the time.
    """
    if fastokens is None or not _spells_unmerged_pieces(json.loads(tokenizer_json)):
        return None
    tokenizer = fastokens.Tokenizer.from_json_str(tokenizer_json)

    def encode_all(texts: Sequence[str]) -> list[np.ndarray]:
        # `split_special_tokens` is what keeps "</s>" in a text from becoming the control token.
        ids, offsets = tokenizer.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        flat = np.frombuffer(ids, dtype=np.int32)
        return [flat[start:end] for start, end in pairwise(np.frombuffer(offsets, dtype=np.uint64).tolist())]

    # A library this young proves itself on each vocabulary it is given.
    exact = all(row.tolist() == encode(text) for row, text in zip(encode_all(_PROBES), _PROBES, strict=True))
    return encode_all if exact else None


def _spells_unmerged_pieces(value: dict[str, Any]) -> bool:
    """Whether the characters of all control and byte pieces' names are pieces themselves."""
    vocab = value["model"]["vocab"]
    unmerged = [token["content"] for token in value["added_tokens"]] + list(filter(_BYTE_NAME.fullmatch, vocab))
    return all(character in vocab for name in unmerged for character in name)
