"""The loop of policy optimisation: sample, score, learn; PPO, or GRPO by `advantage: group`. Source: section 3.2.3.

    prompts of the iteration   a function of (seed, iteration)
    sample                     the engine, on the trainer's own weights
    score                      both reward models and the safety gate, on the sampled ids
    measure                    the trainer's log-probabilities, the reference's, values: one forward pass each
    learn                      whitened reward minus beta * KL -> advantages -> one gradient step per mini-batch

No random state is saved: whatever is drawn is drawn from the seed and the iteration's number, so that a run that was
killed goes on from its newest checkpoint as if nothing had happened.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.align.experience import (
    Arithmetic,
    describe,
    final_rewards,
    measure,
    mini_batches,
    score_rollouts,
    to_experience,
)
from groundup.align.guards import Best, diverges
from groundup.align.learner import STEP_0_TOLERANCE, Learner, PolicyModels, SkipCount, checksum
from groundup.align.ppo_config import PolicyConfig
from groundup.align.reward import RewardScorer
from groundup.align.rollouts import PromptSet, Rollouts, Sampler, rollout_weights
from groundup.base.artifacts import LOGS
from groundup.base.files import sha256_json
from groundup.base.memory import keep_freed_memory
from groundup.base.metrics import MetricsLog
from groundup.base.progress import Progress, say
from groundup.base.records import Prompt
from groundup.base.seeds import derive_seed
from groundup.text.chat import ChatFormat
from groundup.text.tokenizer import Tokenizer
from groundup.train.checkpoint import Checkpoints, frozen_digest
from groundup.train.loop import CHECKPOINTS, choose_precision
from groundup.train.meter import peak_memory_bytes
from groundup.train.parallel import connect
from groundup.train.step import seed_step

PARTS = ("generating", "scoring", "training")
"""What the time of an iteration goes to; scoring is every forward pass without a gradient step."""
TIMING_KEYS = ("seconds", "tokens_per_second", "samples_per_second", "memory_gb", *(f"share_{part}" for part in PARTS))
"""Keys of a metrics row that differ between two runs of the same thing."""
ALL_DONE = "all iterations done"

Watch = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float | None]]
"""A second opinion on responses to prompts, from which training does not learn; None where it has none."""


@dataclass(frozen=True)
class PolicyResult:
    """What a run did from its first iteration on, however often it was interrupted."""

    iterations: int
    stopped_because: str
    best_iteration: int | None
    """That of the policy kept; None: held-out prompts were not looked at, and it is the last."""
    skipped_steps: int
    alarms: int
    flat_batches: int
    """Iterations in which all rewards were equal."""
    tokens: int
    """Of prompts and responses, once for each response."""
    seconds: float
    last_row: dict[str, float]

    def summary(self) -> dict[str, Any]:
        """What a manifest says about the run."""
        counts = {key: value for key, value in asdict(self).items() if key not in ("last_row", "seconds")}
        rows = {key: value for key, value in self.last_row.items() if key not in TIMING_KEYS}
        return {
            **rows, **counts, "train_seconds": self.seconds, "peak_memory_gb": self.last_row.get("memory_gb"),
            "tokens_per_second": round(self.tokens / max(self.seconds, 1e-9), 1),
        }  # fmt: skip


@dataclass
class _Done:
    """How far a run is; saved with every checkpoint."""

    iteration: int = 0
    stopped_because: str = ""
    alarms: int = 0
    flat_batches: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skips: dict[str, int] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    """Of the iterations in the alarm's window, like `watched`."""
    watched: list[float] = field(default_factory=list)
    last_row: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Setup:
    """What a run works with."""

    models: PolicyModels
    scorer: RewardScorer
    prompts: PromptSet
    held_out: PromptSet | None
    """For the early stop; None: the policy kept is the last."""
    tokenizer: Tokenizer
    chat: ChatFormat
    watch: Watch | None = None


def train_ppo(setup: Setup, config: PolicyConfig, work: Path, *, seed: int, name: str = "ppo") -> PolicyResult:
    """Optimise the policy in place; continues from the newest checkpoint in `work`, if there is one.

    In the end the policy is the best one on the held-out prompts where they are looked at, else the last. Under
    torchrun every rank calls this with the same arguments. Metrics go to `work/logs` (rank 0), one row an iteration,
    and a row 0 for the start policy's held-out reward.

    Raises: `UserError` for too many bad steps in a row, a full disk, scores that are not finite.
    """
    run = _Run(setup, config, work, seed, name)
    with run.log_and_progress():
        if run.done.iteration == 0:
            run.evaluate_start()
        while not run.done.stopped_because:
            seed_step(seed, run.done.iteration, run.ranks.rank)
            run.iterate()
    return run.finish()


class _Run:
    """What the iterations of one call of `train_ppo` share."""

    def __init__(self, setup: Setup, config: PolicyConfig, work: Path, seed: int, name: str) -> None:
        keep_freed_memory()
        self.setup, self.config, self.work, self.seed, self.name = setup, config, work, seed, name
        self.models, self.scorer, self.prompts = setup.models, setup.scorer, setup.prompts
        self.held_out = setup.held_out if config.evaluate_every is not None else None
        self.ranks = connect()
        self.precision = choose_precision(config.precision, self.ranks.device)
        self.arithmetic = Arithmetic(self.ranks, self.precision)
        weights = rollout_weights(config, self.precision, self.models.policy)
        self.sampler = Sampler(setup.tokenizer, setup.chat, config, weights, self.ranks)
        max_tokens = max(map(len, self.prompts.ids)) + config.max_new_tokens
        self.learner = Learner(self.models, config, self.arithmetic, max_tokens, name)
        for reward_model in self.scorer.models.values():
            reward_model.requires_grad_(False).to(self.ranks.device)
        self.checkpoints = Checkpoints(work / CHECKPOINTS, config.keep_checkpoints, self.ranks)
        prompt_ids = [self.prompts.ids, self.held_out.ids if self.held_out else []]
        self.identity = {
            **config.trajectory(), "seed": seed, "prompts": sha256_json(prompt_ids),
            "frozen": frozen_digest(self.models.policy),
        }  # fmt: skip
        self.frozen = {"reference": self.models.reference, **self.scorer.models}
        self.frozen_sums = {key: checksum(model) for key, model in self.frozen.items()}
        self.policy_sum = checksum(self.models.policy)
        if self.held_out is not None:
            self.learner.remember_best()
        self.done = self._restore()
        self.best = Best(**self.done.best)
        self.learner.skips = SkipCount(**self.done.skips)
        self.started = self.last_checkpoint = time.monotonic()
        self.seconds_before = self.done.seconds
        self.times = dict.fromkeys(PARTS, 0.0)
        self.metrics: MetricsLog | None = None
        self.progress: Progress | None = None

    def _restore(self) -> _Done:
        state = self.checkpoints.load_newest(self.learner.saved, self.learner.optimizer, self.identity)
        if state is None:
            return _Done()
        done = _Done(**state)
        if self.ranks.is_first:
            say(f"{self.name}: continuing after iteration {done.iteration} of {self.config.iterations}")
        return done

    @contextlib.contextmanager
    def log_and_progress(self) -> Iterator[None]:
        """On rank 0, the metrics log (rows after the checkpoint are cut away; they come again) and the progress bar."""
        if not self.ranks.is_first:
            yield
            return
        done = self.done.iteration
        self.metrics = MetricsLog(self.work / LOGS, done + 1 if done else 0)
        with (
            contextlib.closing(self.metrics),
            Progress(self.name, self.config.iterations, "iterations", done) as self.progress,
        ):
            yield

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.times[part] += time.monotonic() - started

    # ---- one iteration

    def iterate(self) -> None:
        """Sample, score, learn, evaluate if that is due, log, and save if that is due."""
        config, done, number = self.config, self.done, self.done.iteration
        started = time.monotonic()
        self.times = dict.fromkeys(PARTS, 0.0)
        seed = derive_seed(self.seed, "iteration", number)
        indices = self.prompts.draw(config.batch_rows // config.samples_per_prompt, self.seed, number)
        rollouts = self._sample(self.prompts, indices, seed, config.samples_per_prompt)
        with self._timed("scoring"):
            scores = score_rollouts(self.scorer, rollouts, self.arithmetic)
            first_epoch = mini_batches(config.batch_rows, config.mini_batch_rows, seed, 0)
            measured = measure(
                self.models.policy, self.models.reference, self.models.value, rollouts, first_epoch, config,
                self.arithmetic,
            )  # fmt: skip
            rewards = final_rewards(scores.gated, rollouts.is_finished, config.missing_eos_penalty)
            experience = to_experience(rollouts, measured, rewards, config)
            row: dict[str, Any] = describe(rollouts, measured, scores, experience, self.models.policy.config.vocab_size)
            row |= self._watched(rollouts)
        if number == 0:
            distance = float((measured.logps - measured.reference_logps).abs().max())
            assert distance <= STEP_0_TOLERANCE[self.precision], f"the policy starts {distance} nats off its reference"
        self._note_flat(rewards)
        done.iteration = number + 1
        done.tokens += sum(map(len, rollouts.prompt_ids)) + int(rollouts.lengths.sum())
        self._guard(row)
        if not done.stopped_because:
            with self._timed("training"):
                row |= self.learner.learn(experience, seed)
            self._check_weights(row)
        if not done.stopped_because and done.iteration == config.iterations:
            done.stopped_because = ALL_DONE
        speed = self._speed(int(rollouts.lengths.sum()), time.monotonic() - started)
        if done.stopped_because or _is_due(done.iteration, config.evaluate_every):
            row |= self._evaluate()
        self._log({**row, **speed})
        self._save_if_due()

    def _sample(self, prompts: PromptSet, indices: Sequence[int], seed: int, samples: int = 1) -> Rollouts:
        with self._timed("generating"):
            return self.sampler.sample(self.models.policy, prompts, indices, seed, samples)

    def _watched(self, rollouts: Rollouts) -> dict[str, float]:
        """The second opinion's mean; nothing where it has no opinion on any response."""
        if self.setup.watch is None:
            return {}
        texts = [self.setup.tokenizer.decode(response) for response in rollouts.responses]
        found = [score for score in self.setup.watch(rollouts.prompts, texts) if score is not None]
        return {"watched": math.fsum(found) / len(found)} if found else {}

    def _note_flat(self, rewards: Tensor) -> None:
        if bool((rewards == rewards[0]).all()):
            self.done.flat_batches += 1
            if self.ranks.is_first and self.done.flat_batches == 1:
                say(f"{self.name}: iteration {self.done.iteration + 1}: all rewards are equal, none says what to learn")

    def _guard(self, row: dict[str, Any]) -> None:
        """Stop on a divergence that is too large, and on a reward that rises while the second opinion falls."""
        config, done = self.config, self.done
        if config.max_kl is not None and row["kl"] > config.max_kl:
            done.stopped_because = f"KL of {row['kl']:.1f} nats per response exceeds max_kl = {config.max_kl:g}"
        if "watched" in row:
            done.rewards = [*done.rewards, row["reward"]][-config.alarm_window :]
            done.watched = [*done.watched, row["watched"]][-config.alarm_window :]
        if len(done.rewards) == config.alarm_window and diverges(done.rewards, done.watched, config.alarm_sigmas):
            row["alarm"] = 1
            done.alarms += 1
            done.rewards, done.watched = [], []  # the next alarm is about other iterations
            text = f"over {config.alarm_window} iterations the reward rose while the second opinion fell"
            if self.ranks.is_first:
                say(f"{self.name}: iteration {done.iteration}: divergence alarm: {text}")
            if config.on_alarm == "stop":
                done.stopped_because = done.stopped_because or f"divergence alarm: {text}"

    def _check_weights(self, row: dict[str, Any]) -> None:
        """After the first iteration: what is frozen stayed as it was, and the policy did not."""
        if self.done.iteration > 1:
            return
        self._check_frozen()
        took_steps = row.get("policy_grad_norm", 0.0) > 0
        assert not took_steps or checksum(self.models.policy) != self.policy_sum, "the policy does not learn"

    def _check_frozen(self) -> None:
        for key, model in self.frozen.items():
            assert checksum(model) == self.frozen_sums[key], f"the {key} model changed, and it is frozen"

    # ---- held-out prompts

    def evaluate_start(self) -> None:
        """The start policy's reward on held-out prompts, as row 0 of the log."""
        if (row := self._evaluate()) and self.metrics is not None:
            self.metrics.log(0, row)

    def _evaluate(self) -> dict[str, float]:
        """Rewards on held-out prompts, of responses drawn with the same random numbers each time; may stop the run.

        Choice: the mean gated score, not whitened, which would be 0 each time. Where not ending is punished in
        training, a cut-off response counts as the worst one here.
        """
        if self.held_out is None:
            return {}
        seed = derive_seed(self.seed, "held-out")
        # Drawn from all of them: the first ones would all be of the same source.
        indices = self.held_out.draw(min(self.config.evaluate_prompts, len(self.held_out.prompts)), seed, 0)
        rollouts = self._sample(self.held_out, indices, seed)
        scores = score_rollouts(self.scorer, rollouts, self.arithmetic)
        gated = scores.gated
        if self.config.missing_eos_penalty is not None:
            gated = torch.where(rollouts.is_finished, gated, gated.min())
        row = {"reward": float(gated.mean()), "eos_rate": float(rollouts.is_finished.float().mean())}
        row |= self._watched(rollouts)
        chosen = row["reward"] if self.config.select_by == "reward" else row.get("watched")
        if chosen is not None and self.best.take(chosen, self.done.iteration):
            self.learner.remember_best()
        elif self.best.worse_in_a_row >= self.config.patience and not self.done.stopped_because:
            self.done.stopped_because = (
                f"no better on held-out prompts in {self.config.patience} evaluations since iteration "
                f"{self.best.iteration}"
            )
        return {f"held_out_{key}": value for key, value in row.items()}

    # ---- log and checkpoints

    @property
    def _seconds(self) -> float:
        return round(self.seconds_before + time.monotonic() - self.started, 3)

    def _speed(self, response_tokens: int, elapsed: float) -> dict[str, float]:
        shares = {f"share_{part}": round(seconds / elapsed, 4) for part, seconds in self.times.items()}
        return {
            "seconds": self._seconds,
            "tokens_per_second": round(response_tokens / elapsed, 1),
            "samples_per_second": round(self.config.batch_rows / elapsed, 3),
            "memory_gb": round(peak_memory_bytes(self.ranks.device) / 1e9, 3),
            **shares,
        }

    def _log(self, row: dict[str, Any]) -> None:
        self.done.last_row = row
        if self.metrics is not None:
            self.metrics.log(self.done.iteration, row)
        if self.progress is not None:
            self.progress.advance(1, note(row))

    def _save_if_due(self) -> None:
        config, done = self.config, self.done
        minutes = config.checkpoint_every_minutes
        is_time = minutes is not None and time.monotonic() - self.last_checkpoint > 60 * minutes
        # Rank 0's clock decides for all.
        asked = self.ranks.all_sum(torch.tensor(float(is_time and self.ranks.is_first)))
        if not (done.stopped_because or asked > 0 or _is_due(done.iteration, config.checkpoint_every)):
            return
        done.best, done.skips, done.seconds = asdict(self.best), asdict(self.learner.skips), self._seconds
        if self.metrics is not None:
            self.metrics.sync()
        self.checkpoints.save(self.learner.saved, self.learner.optimizer, done.iteration, self.identity, asdict(done))
        self.last_checkpoint = time.monotonic()

    def finish(self) -> PolicyResult:
        """Leave the best policy in place."""
        self._check_frozen()
        if self.held_out is not None:
            self.learner.restore_best()
        done = self.done
        # So that what comes after draws the same numbers whether or not this process took the last step.
        seed_step(self.seed, done.iteration, self.ranks.rank)
        if self.ranks.is_first:
            say(f"{self.name}: stopped after iteration {done.iteration}: {done.stopped_because}")
        return PolicyResult(
            done.iteration, done.stopped_because, self.best.iteration if self.held_out is not None else None,
            self.learner.skips.total, done.alarms, done.flat_batches, done.tokens, done.seconds, done.last_row,
        )  # fmt: skip


def note(row: dict[str, Any]) -> str:
    """A row of the metrics log in one line."""
    models = " ".join(f"{name} {row[name]:+.2f}" for name in ("helpful", "safety") if name in row)
    shares = "/".join(f"{100 * row[f'share_{part}']:.0f}" for part in PARTS)
    clip_fraction = row.get("policy_clip_fraction", math.nan)
    return (
        f"reward {row['reward']:+.3f} ({models})  KL {row['kl']:.3f}  entropy {row['entropy_per_token']:.2f}  "
        f"length {row['length']:.1f}  clipped {clip_fraction:.1%}  {row['tokens_per_second']:,.0f} tokens/s  "
        f"gen/score/train {shares} %"
    )


def _is_due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0
