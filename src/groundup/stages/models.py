"""What a user means by MODEL: a folder, a file, RUN/ARTIFACT, RUN, or a name from the catalogue."""

from pathlib import Path

from groundup.base.artifacts import MANIFEST, open_artifact
from groundup.base.errors import UserError
from groundup.data.sources import find_source, get_source, nearest_source

NEWEST_FIRST = ("sft-v2", "sft-v1", "base")
"""Model artifacts of a run."""


def resolve_model(text: str) -> Path:
    """The model file or folder that `text` names; a name from the catalogue is fetched."""
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / MANIFEST).exists():
            return open_artifact(path, "model").path
        run = [path / name for name in NEWEST_FIRST if (path / name / MANIFEST).exists()]
        return run[0] if run else path
    source = find_source(text)
    if source is None:
        raise UserError(
            f"{text}: no such file or folder, and no such model in the catalogue{nearest_source(text)}",
            "MODEL is a folder, a file, RUN/ARTIFACT such as runs/quickstart/sft-v2, or a name that "
            "`groundup data list` shows with kind model",
        )
    if source.kind != "model":
        raise UserError(
            f"{text}: a source of {source.kind} where a model is needed", "groundup data list shows the kinds"
        )
    return get_source(source.name)
