"""What a stage is given to work with, besides its own configuration."""

from dataclasses import dataclass
from pathlib import Path

from groundup.base.artifacts import Artifact


@dataclass(frozen=True)
class Job:
    """One execution of one stage. The pipeline makes it; the stage fills `out` and returns its metrics."""

    name: str
    """Artifact name, e.g. "sft-v1"."""
    seed: int
    """The stage's own seed, derived from the recipe's."""
    inputs: dict[str, Artifact]
    """Role -> finished artifact, e.g. {"base": ..., "tokenizer": ...}; absent roles are not in it."""
    out: Path
    """A folder to fill; it becomes the artifact when `run` returns, and is discarded when it raises."""
    work: Path
    """A folder that survives a kill; keyed by the stage's fingerprint, so that what lies in it belongs to this job."""
