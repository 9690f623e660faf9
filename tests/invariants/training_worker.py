"""The processes that `test_resume.py` and `test_parallel.py` start and kill; not a test itself.

training_worker.py kills FOLDER SEED RANDOM_KILLS CALL_KILLS    resumed runs against an uninterrupted one
training_worker.py train FOLDER MODE:NAME:STEPS:tied|untied ...   runs, alone or under torchrun
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tensorboard.summary.writer.event_file_writer  # noqa: F401 - so that children need not load it
import torch

import groundup.train.checkpoint
from groundup.base.metrics import METRICS_FILE, read_metrics
from groundup.data.batches import Batch, micro_ranges
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.train.config import TrainConfig
from groundup.train.loop import fit
from groundup.train.losses import LossSum, lm_loss
from groundup.train.meter import TIMING_KEYS
from groundup.train.parallel import connect, unsharded

ROWS, T, VOCAB = 8, 12, 61


class ToyBatches:
    """Random rows; the first has no target and the last only targets, so that ranks and micro batches differ widely."""

    batch_rows = ROWS
    steps_per_epoch = 10

    def micro_batches(self, step: int, rank: int, world_size: int, micro_rows: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(VOCAB, (ROWS, T + 1), generator=generator)
        is_target = torch.rand(ROWS, T, generator=generator) < torch.linspace(0, 1, ROWS)[:, None]
        parts = [slice(rows.start, rows.stop) for rows in micro_ranges(ROWS, rank, world_size, micro_rows)]
        return [Batch(tokens[rows, :-1], tokens[rows, 1:], is_target[rows]) for rows in parts]


def noisy_loss(model: Transformer, batch: Batch) -> LossSum:
    """Needs random numbers, as a loss with dropout or sampling does."""
    return lm_loss(model, replace(batch, is_target=batch.is_target & (torch.rand(batch.is_target.shape) < 0.9)))


def train(folder: Path, mode: str, steps: int, tied: bool, loss_fn: Callable[..., LossSum]) -> Transformer:
    # Sizes that two ranks cannot share equally.
    shape = ModelConfig(
        VOCAB, dim=36, n_layers=2, n_heads=3, n_kv_heads=1, head_dim=12, ffn_dim=45, tie_embeddings=tied
    )
    model = Transformer(shape)
    model.init_weights(0)
    config = TrainConfig(
        steps=steps, batch_rows=ROWS, micro_rows=2, seq_len=T, lr=1e-2, precision="fp32", parallel=mode,  # type: ignore[arg-type]
        checkpoint_every_steps=3, evaluate_every_steps=4,
    )  # fmt: skip

    def evaluate(model: Transformer, step: int) -> dict[str, float]:
        loss = lm_loss(model, ToyBatches().micro_batches(999, 0, 1, ROWS)[0])
        return {"held_out_loss": float(loss.loss_sum / loss.count)}

    fit(
        model, ToyBatches(), loss_fn, config, folder, seed=5, evaluate=evaluate, sample=lambda model, step: f"at {step}"
    )
    return model


def digest(folder: Path) -> dict[str, Any]:
    """All that must be equal at the end of two runs."""
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.safetensors")}
    assert len(files) == 2
    state = json.loads((newest / "state.json").read_text())["state"]
    state.pop("seconds")
    state["last_row"] = {key: value for key, value in state["last_row"].items() if key not in TIMING_KEYS}
    rows = read_metrics(folder / "logs" / METRICS_FILE)
    losses = [{key: value for key, value in row.items() if key not in TIMING_KEYS} for row in rows]
    return {"files": files, "state": state, "rows": losses, "random": (folder / "random").read_text()}


def child(folder: Path, steps: int, kill_at_call: int | None) -> int:
    """Start training in a process of its own; it may kill itself at its n-th file operation."""
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        os.dup2(os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if kill_at_call is not None:
            install_killer(kill_at_call)
        train(folder, "ddp", steps, False, noisy_loss)
        (folder / "random").write_text(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest())
        os._exit(0)
    return process


def install_killer(count: int) -> None:
    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    groundup.train.checkpoint.save_file = dying(groundup.train.checkpoint.save_file)


def ended(process: int, kill_after_seconds: float | None) -> int:
    """Wait for a child, killing it without warning after a time; its exit code."""
    if kill_after_seconds is not None:
        time.sleep(kill_after_seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kills(folder: Path, seed: int, random_kills: int, call_kills: int) -> dict[str, Any]:
    """Trials of up to three kills each, at random times and at random file operations."""
    steps = 24
    started = time.monotonic()
    assert ended(child(folder / "whole", steps, None), None) == 0
    seconds = time.monotonic() - started
    expected = digest(folder / "whole")
    rng = random.Random(seed)
    killed = resumed = 0
    kinds = ["time"] * random_kills + ["call"] * call_kills
    for number, kind in enumerate(kinds):
        run = folder / f"run-{number}"
        for _ in range(rng.randint(1, 3)):
            after = rng.uniform(0.05, 0.7 * seconds) if kind == "time" else None
            code = ended(child(run, steps, rng.randint(1, 250) if kind == "call" else None), after)
            killed += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), run.with_suffix(".log").read_text()
        code = ended(child(run, steps, None), None)
        log = run.with_suffix(".log").read_text()
        assert code == 0, log
        resumed += "continuing after step" in log
        found = digest(run)
        assert found == expected, f"trial {number} ({kind}) differs: {found} != {expected}"
        shutil.rmtree(run)
    return {"trials": len(kinds), "killed": killed, "resumed": resumed, "rows": len(expected["rows"])}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[1] == "kills":
        print(json.dumps(kills(folder, *map(int, sys.argv[3:]))))
    else:
        for job in sys.argv[3:]:
            mode, name, steps, tied = job.split(":")
            model = unsharded(train(folder / name, mode, int(steps), tied == "tied", lm_loss))
            if connect().is_first:
                torch.save(
                    {key: value.detach() for key, value in model.named_parameters()}, folder / name / "weights.pt"
                )


if __name__ == "__main__":
    main()
