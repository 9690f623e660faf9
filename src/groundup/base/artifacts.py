"""Artifacts: what stages hand to each other. A folder is an artifact once it has a manifest, which is written last.

The manifest names kind, inputs (role -> path and id), resolved config, command line, code version, environment, seed,
metrics, cost, and the sha256 of each file, so that a flipped bit is found (safetensors and torch.save find none).
"""

import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from groundup.base.errors import CorruptFile, UserError
from groundup.base.files import read_json, recover_folder, replace_folder, sha256_file, sha256_json, write_json

MANIFEST = "manifest.json"
LOGS = "logs"
"""Sub-folder of an artifact whose files carry times; it is checksummed but does not count towards the artifact's id."""


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def id(self) -> str:
        """Hex digest of the content: equal ids mean equal files (apart from logs)."""
        return str(self.manifest["id"])

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self.manifest.get("metrics", {}))

    def file(self, name: str) -> Path:
        """The path of one of its files; a `UserError` if the artifact has none of that name."""
        path = self.path / name
        if not path.exists():
            raise UserError(f"{self.path}: artifact of kind {self.kind!r} has no file {name!r}")
        return path

    def verify(self) -> "Artifact":
        """Compare every file with its sha256; raises `CorruptFile` naming the first that differs."""
        for name, entry in self.manifest["files"].items():
            path = self.path / name
            if not path.exists():
                raise CorruptFile(f"{path}: listed in {MANIFEST} but missing", "run its stage again")
            if path.stat().st_size != entry["bytes"]:
                raise CorruptFile(
                    f"{path}: {path.stat().st_size} bytes, but {MANIFEST} says {entry['bytes']}", "run its stage again"
                )
            if sha256_file(path) != entry["sha256"]:
                raise CorruptFile(f"{path}: sha256 differs from {MANIFEST}", "run its stage again")
        return self


def open_artifact(path: Path, kind: str | None = None, *, verify: bool = False) -> Artifact:
    """The artifact in folder `path`; `kind` is what the caller can use."""
    recover_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such artifact")
    if not (path / MANIFEST).exists():
        raise UserError(f"{path}: not an artifact (no {MANIFEST})", "was its stage finished? groundup run goes on")
    artifact = Artifact(path, read_json(path / MANIFEST))
    if kind is not None and artifact.kind != kind:
        raise UserError(f"{path}: an artifact of kind {artifact.kind!r} where {kind!r} is needed")
    return artifact.verify() if verify else artifact


@contextmanager
def new_artifact(final: Path, manifest: dict[str, Any]) -> Iterator[Path]:
    """A temporary folder to fill; on leaving it gets its manifest, is synced, and takes the place of `final`.

    `manifest` needs `kind`; the caller may go on adding keys (metrics ...) until the block ends. On error the temporary
    folder is removed and an older artifact at `final` stays as it was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = {
            str(path.relative_to(temporary)): {"sha256": sha256_file(path), "bytes": path.stat().st_size}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        content = {name: entry["sha256"] for name, entry in files.items() if Path(name).parts[0] != LOGS}
        write_json(temporary / MANIFEST, {**provenance(), **manifest, "files": files, "id": sha256_json(content)})
        replace_folder(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def provenance() -> dict[str, Any]:
    """What ran, where and when."""
    versions: dict[str, str | None] = {}
    for name in ("groundup", "torch", "numpy", "tokenizers", "sentencepiece", "safetensors"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "argv": sys.argv,
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": {"python": platform.python_version(), "platform": platform.platform(), "versions": versions},
    }


def lineage(path: Path) -> list[tuple[int, Path, dict[str, Any]]]:
    """An artifact and everything it was made from, depth first: (depth, path, manifest or input entry)."""
    rows: list[tuple[int, Path, dict[str, Any]]] = []

    def walk(folder: Path, depth: int) -> None:
        manifest = open_artifact(folder).manifest
        rows.append((depth, folder, manifest))
        for role, entry in manifest.get("inputs", {}).items():
            child = (folder / entry["path"]).resolve() if entry.get("relative") else Path(entry["path"])
            if (child / MANIFEST).exists():
                walk(child, depth + 1)
            else:
                rows.append((depth + 1, child, {"kind": "file", "role": role, **entry}))

    walk(path, 0)
    return rows
