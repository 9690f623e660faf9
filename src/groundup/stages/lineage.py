"""Where an artifact came from, back to the raw text."""

from pathlib import Path
from typing import Any

from rich.text import Text
from rich.tree import Tree

from groundup.base.artifacts import MANIFEST, lineage, open_artifact
from groundup.base.errors import UserError


def find_artifact(path: Path) -> Path:
    """`path` itself when it is an artifact; of a run, the one finished last that is not a report."""
    if (path / MANIFEST).exists():
        return path
    if not path.exists():
        raise UserError(
            f"{path}: no such run or artifact", "name a run's folder, e.g. runs/quickstart, or RUN/ARTIFACT"
        )
    found = [open_artifact(folder) for folder in sorted(path.iterdir()) if (folder / MANIFEST).exists()]
    made = [artifact for artifact in found if artifact.kind != "report"]
    if not made:
        raise UserError(f"{path}: holds no finished artifact", "groundup run makes them")
    # Times in manifests are whole seconds; small stages take less.
    return max(made, key=lambda a: (a.manifest["finished_at"], (a.path / MANIFEST).stat().st_mtime_ns)).path


def lineage_tree(path: Path) -> Tree:
    """The artifact at `path` as a tree of everything it was made from; what was shown before is not unfolded again."""
    rows = lineage(path)
    tree = Tree(_label(rows[0][1], rows[0][2]))
    branches = [tree]
    seen: set[Path] = set()
    folded_at: int | None = None
    for depth, folder, manifest in rows[1:]:
        if folded_at is not None and depth > folded_at:
            continue
        folded_at = None
        label = _label(folder, manifest)
        if folder in seen and _is_artifact(manifest):
            label = Text.assemble((folder.name, "bold"), "  (see above)")
            folded_at = depth
        seen.add(folder)
        del branches[depth:]
        branches.append(branches[-1].add(label))
    return tree


def _is_artifact(manifest: dict[str, Any]) -> bool:
    return "files" in manifest and "fingerprint" in manifest


def _label(path: Path, manifest: dict[str, Any]) -> Text:
    if not _is_artifact(manifest):
        count = f"{manifest['files']} files, " if manifest.get("files", 1) != 1 else ""
        return Text.assemble(
            (str(path), "cyan"), f"  {count}{manifest['bytes']:,} bytes" if "bytes" in manifest else ""
        )
    label = Text.assemble((path.name, "bold"), f"  {manifest['kind']} {manifest['id'][:12]}")
    label.append(f"  {manifest['finished_at']}, {manifest['cost']['wall_seconds']:.1f} s", "dim")
    for name in _named_sources(manifest):
        label.append(f"\n  reads {name}", "dim")
    return label


def _named_sources(manifest: dict[str, Any]) -> list[str]:
    """Named sources that a stage's config lists: pinned packages have no file of their own among the inputs."""
    config = manifest["config"]
    entries = config.get("sources") or config.get("dialogues") or config.get("source") or []
    names = [entry["source"] if isinstance(entry, dict) else entry for entry in _as_list(entries)]
    files = {entry["path"] for entry in manifest["inputs"].values()}
    return [name for name in names if str(Path(name).expanduser().resolve()) not in files]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
