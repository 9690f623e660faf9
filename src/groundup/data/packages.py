"""Archives from package registries: fetched by the registry's own client, checked by sha256, read as plain zip or tar.

Nothing in an archive is installed, imported or run, and no member is written under a name that the archive chose.
"""

import fnmatch
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal

from groundup.base.config import Config
from groundup.base.errors import CorruptFile, UserError
from groundup.base.files import cache_folder, fsync_path, sha256_file
from groundup.base.progress import say

_STAND_IN = '''\
"""Takes the place of a source archive's build backend: hands pip the metadata that the archive already holds."""
import email, pathlib, shutil

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    facts = email.message_from_string(pathlib.Path("PKG-INFO").read_text(encoding="utf-8"))
    info = pathlib.Path(folder, f"{facts['Name']}-{facts['Version']}.dist-info")
    info.mkdir()
    shutil.copyfile("PKG-INFO", info / "METADATA")
    return info.name
'''
_WHEEL_TAGS = re.compile(r"-cp(?P<python>\d+)-(?P<abi>[a-z0-9]+)-(?P<platforms>[^-]+)\.whl$")


class Package(Config):
    """One archive in a registry, pinned."""

    manager: Literal["pip", "apt"] = "pip"
    version: str
    archive: str
    """File name; it pins wheel or source and, for a binary wheel, the platform, since any one serves everybody."""
    bytes: int
    sha256: str
    build_backend: str | None = None
    """Module that a source archive names as its build backend."""


def archive_folder() -> Path:
    """Where archives are kept."""
    return cache_folder() / "packages"


def fetch(name: str, package: Package) -> Path:
    """The archive of `package` in the cache, downloaded if need be; its sha256 is compared on every call."""
    cached = archive_folder() / package.archive
    if cached.exists():
        if sha256_file(cached) == package.sha256:
            return cached
        say(f"{cached}: sha256 is not the pinned one; fetching it again")
    archive_folder().mkdir(parents=True, exist_ok=True)
    say(f"fetching {package.archive} ({package.bytes / 1e6:.1f} MB) with {package.manager}")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=archive_folder()) as folder:
        run = _pip_download if package.manager == "pip" else _apt_download
        run(name, package, Path(folder))
        fetched = next((path for path in Path(folder).iterdir() if path.suffix in (".whl", ".gz", ".deb")), None)
        if fetched is None or sha256_file(fetched) != package.sha256:
            raise CorruptFile(
                f"package {name} {package.version}: {package.manager} delivered "
                f"{fetched.name if fetched else 'nothing'}, not the file with the pinned sha256",
                _by_hand(package),
            )
        fsync_path(fetched)
        os.replace(fetched, cached)
    return cached


def _pip_download(name: str, package: Package, folder: Path) -> None:
    """Let pip find and check the file, so that its index, proxy, certificate and credential settings all count.

    Why: pip asks a source archive's build backend for metadata, which would run code out of the archive. With build
    isolation off it imports the backend from our search path, where a stand-in takes its place.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet", "--ignore-requires-python",
        "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder),
        "--requirement", str(requirements),
    ]  # fmt: skip
    environment = dict(os.environ)
    if package.build_backend is None:
        command += ["--only-binary", ":all:", *_platform_arguments(package.archive)]
    else:
        backend = folder / "stand-in" / Path(*package.build_backend.split("."))
        backend.parent.mkdir(parents=True)
        (backend.parent / "__init__.py").touch()
        backend.with_suffix(".py").write_text(_STAND_IN)
        environment["PYTHONPATH"] = str(folder / "stand-in")
        command += ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
    _run(command, name, package, environment)
    requirements.unlink()


def _platform_arguments(archive: str) -> list[str]:
    """pip arguments that select this very wheel, whatever machine and Python we are on."""
    tags = _WHEEL_TAGS.search(archive)
    if tags is None:
        return []
    platforms = [argument for tag in tags["platforms"].split(".") for argument in ("--platform", tag)]
    return ["--implementation", "cp", "--python-version", tags["python"], "--abi", tags["abi"], *platforms]


def _apt_download(name: str, package: Package, folder: Path) -> None:
    if shutil.which("apt-get") is None:
        raise UserError(f"package {name}: it comes from Debian, and this machine has no apt-get", _by_hand(package))
    _run(["apt-get", "download", f"{name}={package.version}"], name, package, dict(os.environ), folder)


def _run(command: list[str], name: str, package: Package, environment: dict[str, str], cwd: Path | None = None) -> None:
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise UserError(f"package {name}: this Python has no pip", f"{sys.executable} -m ensurepip")
    # pip repeats itself; of lines that begin alike the last one says it all.
    said = {re.split(r"[('=]", line)[0]: line for line in done.stderr.splitlines() if line.strip()}
    raise UserError(
        f"package {name} {package.version} could not be fetched (offline, or no longer in the registry); "
        f"{package.manager} says:\n    " + "\n    ".join(list(said.values())[-6:]),
        _by_hand(package),
    )


def _by_hand(package: Package) -> str:
    return (
        f"check the connection and {package.manager}'s configuration, or put {package.archive} "
        f"(sha256 {package.sha256}) into {archive_folder()} by hand"
    )


def read_members(archive: Path, patterns: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the members that match the shell patterns, by name; a pattern without any is an error."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                for name in _select(wheel.namelist(), patterns, archive):
                    yield name, wheel.read(name)
        else:
            content = _data_of_deb(archive) if archive.suffix == ".deb" else None
            with tarfile.open(archive, fileobj=content) as tar:
                for name in _select([member.name for member in tar if member.isfile()], patterns, archive):
                    file = tar.extractfile(name)
                    assert file is not None
                    yield name, file.read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise CorruptFile(f"{archive}: not a readable archive ({error})", "delete it; it is fetched again") from None


def _data_of_deb(archive: Path) -> BinaryIO:
    """The data.tar.* in a Debian package, which is an `ar` archive: 60-byte headers, members padded to even sizes."""
    content = archive.read_bytes()
    at = len(b"!<arch>\n")
    while at + 60 <= len(content):
        name, size = content[at : at + 16].decode().strip(" /"), int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return io.BytesIO(content[at + 60 : at + 60 + size])
        at += 60 + size + size % 2
    raise CorruptFile(f"{archive}: a Debian package without data.tar", "delete it; it is fetched again")


def _select(names: Sequence[str], patterns: Sequence[str], archive: Path) -> list[str]:
    selected: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(names, pattern)
        if not found:
            raise CorruptFile(f"{archive}: no member matches {pattern!r}", "report it: the catalogue does not fit")
        selected.update(found)
    return sorted(selected)
