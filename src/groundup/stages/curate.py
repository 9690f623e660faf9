"""Stage `curate`: raw text from files, folders, data sets and named sources -> the corpus artifact."""

from pathlib import Path
from typing import Any

from groundup.data.curate import CurateConfig as CurateConfig
from groundup.data.curate import curate
from groundup.data.sources import find_source
from groundup.stages.job import Job

VERSION = 1


def raw_inputs(config: CurateConfig) -> list[Path]:
    """Files and folders that the config names; named sources and hubs are not among them."""
    return [
        Path(source).expanduser()
        for source in (entry.source for entry in config.sources)
        if "://" not in source and find_source(source) is None
    ]


def run(config: CurateConfig, job: Job) -> dict[str, Any]:
    """Fill the corpus artifact; metrics are documents and characters by split, and drops by reason."""
    report = curate(config, job.seed, job.work, job.out)
    dropped: dict[str, int] = {}
    for source in report["sources"]:
        for what, count in source["documents"].items():
            if what.startswith("dropped: "):
                reason = what.removeprefix("dropped: ")
                dropped[reason] = dropped.get(reason, 0) + count
    return {"train": report["train"], "held_out": report["held_out"], "dropped_documents": dropped}
