"""Exact and near duplicates among documents; of each group the first one stays."""

import hashlib

import numpy as np
from rensa import RMinHash, RMinHashLSH

_PERMUTATIONS = 128
_BANDS = 32
"""Bands of 4 rows: a pair of similarity 0.5 meets with probability 0.87, 0.7 with 0.9999; the threshold decides."""
_SHINGLE_WORDS = 5
_MINHASH_SEED = 1
"""Fixed: which documents are alike does not depend on the run's seed."""


def text_hash(text: str) -> bytes:
    """16 bytes that name a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def minhash(text: str) -> RMinHash:
    """Signature of the set of 5-word runs, ignoring case."""
    words = text.lower().split()
    signature = RMinHash(_PERMUTATIONS, _MINHASH_SEED)
    signature.update([" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))])
    return signature


class Deduplicator:
    """Remembers what came before: 16 bytes a document, and about 5 KB more for near duplicates."""

    def __init__(self, near_threshold: float | None) -> None:
        self._threshold = near_threshold
        self._seen: set[bytes] = set()
        self._index = RMinHashLSH(near_threshold or 1.0, _PERMUTATIONS, _BANDS)
        self._digests: list[np.ndarray] = []

    def reason_to_drop(self, digest: bytes, signature: RMinHash | None) -> str | None:
        """Why this document is no news; None, and remembered, if it is."""
        if digest in self._seen:
            return "exact duplicate"
        self._seen.add(digest)
        if self._threshold is None or signature is None:
            return None
        values = np.array(signature.digest(), np.uint32)
        for candidate in self._index.query(signature):
            if np.mean(self._digests[candidate] == values) >= self._threshold:
                return "near duplicate"
        self._index.insert(len(self._digests), signature)
        self._digests.append(values)
        return None
