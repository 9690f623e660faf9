"""Checkpoints of a run under crashes at every system call, corruption, a full disk and NaN."""

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundup.train.checkpoint
from groundup.base.errors import CorruptFile, UserError
from groundup.train.checkpoint import Checkpoints
from groundup.train.parallel import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
IDENTITY: dict[str, object] = {"seed": 1, "lr": 0.1}


def make(value: float) -> tuple[nn.Module, torch.optim.AdamW]:
    """A model of two tied layers whose weights and optimizer state are functions of `value`."""
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.LayerNorm(5), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.data.fill_(value)
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return model, optimizer


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [optimizer.state[p][key] for p in model.parameters() for key in ("step", "exp_avg", "exp_avg_sq")]
    return [*(p.detach() for p in model.parameters()), *states]


def same(a: tuple[nn.Module, torch.optim.Optimizer], b: tuple[nn.Module, torch.optim.Optimizer]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(*a), tensors(*b), strict=True))


def save(folder: Path, step: int, keep: int = 2) -> tuple[nn.Module, torch.optim.AdamW]:
    pair = make(float(step))
    Checkpoints(folder, keep, ALONE).save(*pair, step, IDENTITY, {"step": step})
    return pair


def load(folder: Path) -> tuple[dict[str, Any] | None, tuple[nn.Module, torch.optim.AdamW]]:
    pair = make(-1.0)
    return Checkpoints(folder, 2, ALONE).load_newest(*pair, IDENTITY), pair


def test_what_is_loaded_is_what_was_saved_and_the_oldest_go(tmp_path: Path) -> None:
    assert load(tmp_path / "none")[0] is None
    for step in (1, 2, 3):
        saved = save(tmp_path, step)
    state, loaded = load(tmp_path)
    assert state == {"step": 3}
    assert same(saved, loaded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_no_file_is_a_pickle(tmp_path: Path) -> None:
    save(tmp_path, 1)
    names = sorted(path.name for path in (tmp_path / "step-00000001").iterdir())
    assert names == ["manifest.json", "model-00000.safetensors", "optimizer-00000.safetensors", "state.json"]


def crash_at(count: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies without a word at its `count`-th file operation; True if it got so far."""
    child = os.fork()
    if child == 0:
        left = count

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os._exit(9)
                return call(*args, **kwargs)

            return wrapped

        for name in ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "open", "chmod"):
            setattr(os, name, dying(getattr(os, name)))
        groundup.train.checkpoint.save_file = dying(groundup.train.checkpoint.save_file)
        groundup.train.checkpoint.sha256_file = dying(groundup.train.checkpoint.sha256_file)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), "the save failed in another way than by the crash"
    return status == 9


def test_a_crash_at_any_file_operation_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    template = tmp_path / "template"
    old = save(template, 1, keep=1)
    new = make(2.0)
    crash, newest = 0, []
    while True:
        crash += 1
        folder = tmp_path / f"crash-{crash}"
        shutil.copytree(template, folder)
        crashed = crash_at(crash, lambda folder=folder: save(folder, 2, keep=1))  # type: ignore[misc]
        state, loaded = load(folder)
        assert state in ({"step": 1}, {"step": 2}), f"crash point {crash}"
        assert same(loaded, old if state == {"step": 1} else new)
        newest.append(state["step"])
        save(folder, 2, keep=1)
        assert load(folder)[0] == {"step": 2}
        assert [path.name for path in folder.iterdir()] == ["step-00000002"], "rubbish of the crash stays"
        if not crashed:
            break
    assert crash > 30, "too few crash points: are the hooks in place?"
    assert newest == sorted(newest), "the new checkpoint counts from one point on"
    assert newest[0] == 1
    assert newest[-1] == 2


def test_a_crash_while_a_damaged_folder_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    template = tmp_path / "template"
    save(template, 1)
    save(template, 2)
    (template / "step-00000002" / "state.json").write_text("{}")
    for crash in range(1, 60):
        folder = tmp_path / f"crash-{crash}"
        shutil.copytree(template, folder)
        crashed = crash_at(crash, lambda folder=folder: save(folder, 2))  # type: ignore[misc]
        assert load(folder)[0] in ({"step": 1}, {"step": 2})
        if not crashed:
            break
    assert not crashed


def test_every_file_is_on_the_disk_before_the_folder_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    fsync, replace = os.fsync, os.replace
    renamed = []

    def note_sync(fd: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def check_rename(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            missing = [path.name for path in Path(source).iterdir() if str(path.resolve()) not in synced]
            assert not missing
            assert (Path(source) / "manifest.json").exists()
            renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", check_rename)
    save(tmp_path, 1)
    assert renamed == ["step-00000001"]
    assert str(tmp_path.resolve()) in synced


def damage(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "truncate", "zeros", "delete", "longer"])
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[rng.randrange(len(data)) :]
    elif kind == "zeros":
        start = rng.randrange(len(data))
        data[start : start + 16] = bytes(b ^ 0xFF for b in data[start : start + 16])
    elif kind == "longer":
        data += b"\0"
    if kind == "delete":
        path.unlink()
    else:
        path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["model-00000.safetensors", "optimizer-00000.safetensors", "state.json"])
def test_damage_is_found_and_the_checkpoint_before_is_taken(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    victim = tmp_path / "step-00000002" / name
    good = victim.read_bytes()
    rng = random.Random(name)
    for _ in range(60):
        damage(victim, rng)
        assert load(tmp_path)[0] == {"step": 1}
        victim.write_bytes(good)
    assert load(tmp_path)[0] == {"step": 2}
    assert f"step-00000002 is damaged ({name}" in capsys.readouterr().err.replace("\n", " ")


def test_a_damaged_manifest_never_lets_wrong_state_through(tmp_path: Path) -> None:
    save(tmp_path, 1)
    second = save(tmp_path, 2)
    victim = tmp_path / "step-00000002" / "manifest.json"
    good = victim.read_bytes()
    rng = random.Random(0)
    went_back = 0
    for _ in range(60):
        damage(victim, rng)
        state, loaded = load(tmp_path)
        # White space and the unused step number may change; then the files still verify.
        assert state == {"step": 1} or same(loaded, second)
        went_back += state == {"step": 1}
        victim.write_bytes(good)
    assert went_back > 40


def test_all_damaged_is_an_error_that_says_so(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "model-00000.safetensors").write_bytes(b"")
    with pytest.raises(CorruptFile, match="none of its 1 checkpoints"):
        load(tmp_path)


def test_a_full_disk_is_named_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("save_file", "fsync_path", "write_json", "replace_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(groundup.train.checkpoint, place, full)
            with pytest.raises(UserError, match="No space left on device.*step-00000001 is intact") as caught:
                save(tmp_path, 2)
        assert "step-00000002.tmp" in caught.value.message
        assert not (tmp_path / "step-00000002.tmp").exists(), "what was half written still fills the disk"
        assert load(tmp_path)[0] == {"step": 1}


def test_a_file_size_limit_of_the_system_is_an_error_of_the_user(tmp_path: Path) -> None:
    """The real thing, in a child: the kernel refuses to let a file grow."""
    import resource
    import signal

    save(tmp_path, 1)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
        try:
            save(tmp_path, 2)
        except UserError as error:
            os._exit(7 if "could not be written" in error.message else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert load(tmp_path)[0] == {"step": 1}


def test_weights_with_nan_are_not_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    model, optimizer = make(2.0)
    next(model.parameters()).data[0, 0] = torch.nan
    with pytest.raises(UserError, match="after step 2 weights hold NaN or Inf and were not saved: 0.weight"):
        Checkpoints(tmp_path, 2, ALONE).save(model, optimizer, 2, IDENTITY, {})
    assert load(tmp_path)[0] == {"step": 1}


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match="other values of lr"):
        Checkpoints(tmp_path, 2, ALONE).load_newest(*make(0.0), {**IDENTITY, "lr": 0.2})


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    model = nn.Sequential(nn.Linear(3, 6, bias=False), nn.LayerNorm(6), nn.Linear(3, 6, bias=False))
    model[2].weight = model[0].weight
    with pytest.raises(UserError, match=r"'0\.weight' has 5 rows"):
        Checkpoints(tmp_path, 2, ALONE).load_newest(model, torch.optim.AdamW(model.parameters()), IDENTITY)


def test_buffers_would_be_forgotten_and_are_refused(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(2)
    with pytest.raises(AssertionError, match="buffers"):
        Checkpoints(tmp_path, 2, ALONE).save(model, torch.optim.AdamW(model.parameters()), 1, IDENTITY, {})
