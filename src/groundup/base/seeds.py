"""Named random streams: every consumer of randomness has its own, so that adding one never shifts another."""

import hashlib


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`, a pure function of the run's seed and the names.

    Why: `seed + 1` style offsets collide between stages and between steps; a hash does not.
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
