"""An artifact is either whole or not there, whatever happens while it is made."""

import os
from pathlib import Path

import pytest

from groundup.base.artifacts import MANIFEST, lineage, new_artifact, open_artifact
from groundup.base.errors import CorruptFile, UserError
from groundup.base.files import replace_folder


def make(path: Path, text: str, **manifest: object) -> None:
    with new_artifact(path, {"kind": "text", **manifest}) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)
        (folder / "logs").mkdir()
        (folder / "logs" / "time.txt").write_text(os.urandom(8).hex())


def test_round_trip_and_id(tmp_path: Path) -> None:
    make(tmp_path / "one", "hello")
    make(tmp_path / "two", "hello")
    make(tmp_path / "three", "other")
    one, two, three = (open_artifact(tmp_path / name, "text", verify=True) for name in ("one", "two", "three"))
    assert one.file("sub/a.txt").read_text() == "hello"
    assert one.id == two.id, "logs hold times and do not count"
    assert one.id != three.id


def test_an_error_leaves_the_old_artifact(tmp_path: Path) -> None:
    make(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), new_artifact(tmp_path / "a", {"kind": "text"}) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert open_artifact(tmp_path / "a", verify=True).file("sub/a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


class Killed(BaseException):
    """Stands for kill -9: nothing of ours may catch it and tidy up."""


def test_a_kill_between_any_two_system_calls_leaves_a_whole_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Enumerated crash points: every fsync, rename and removal of the replacement is a place to die."""
    import shutil

    real = {"replace": os.replace, "fsync": os.fsync}
    real_rmtree = shutil.rmtree
    survived = 0
    for crash_at in range(100):
        root = tmp_path / str(crash_at)
        make(root / "a", "old")
        new = root / "new"
        new.mkdir()
        (new / "b.txt").write_text("new")
        (new / MANIFEST).write_text((root / "a" / MANIFEST).read_text())
        calls = 0

        def dying(function, crash_at=crash_at):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > crash_at:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name, function in real.items():
                patch.setattr(os, name, dying(function))
            patch.setattr(shutil, "rmtree", dying(real_rmtree))
            try:
                replace_folder(new, root / "a")
                done = True
            except Killed:
                done = False
        artifact = open_artifact(root / "a")
        names = {path.name for path in artifact.path.iterdir()}
        assert names in ({"sub", "logs", MANIFEST}, {"b.txt", MANIFEST})
        survived += 1
        if done:
            assert names == {"b.txt", MANIFEST}
            break
    assert survived > 5, "the replacement has at least this many system calls"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_named(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "a", "hello")
    path = tmp_path / "a" / "sub" / "a.txt"
    if damage == "flip":
        path.write_text("hellp")
    elif damage == "truncate":
        path.write_text("hell")
    else:
        path.unlink()
    with pytest.raises(CorruptFile, match=r"a\.txt"):
        open_artifact(tmp_path / "a", verify=True)


def test_wrong_kind_and_missing(tmp_path: Path) -> None:
    make(tmp_path / "a", "x")
    with pytest.raises(UserError, match="'text' where 'model' is needed"):
        open_artifact(tmp_path / "a", "model")
    with pytest.raises(UserError, match="no such artifact"):
        open_artifact(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match="not an artifact"):
        open_artifact(tmp_path / "c")


def test_lineage_goes_back_to_raw_files(tmp_path: Path) -> None:
    raw = tmp_path / "raw.txt"
    raw.write_text("x")
    make(tmp_path / "corpus", "x", inputs={"text": {"path": str(raw)}})
    make(tmp_path / "shards", "y", inputs={"corpus": {"path": "../corpus", "relative": True}})
    rows = lineage(tmp_path / "shards")
    assert [(depth, path.name) for depth, path, _ in rows] == [(0, "shards"), (1, "corpus"), (2, "raw.txt")]
