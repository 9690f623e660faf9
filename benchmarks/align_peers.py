"""The peers of benchmarks/align.py and what each of them does in a turn."""

import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_models import SHAPES, random_model

POLICY, REWARD, WORK = "policy", "reward", "work.json"
ALL = "all"
Seconds = dict[str, float]
"""What a turn took: under `ALL`, and by part where that is known."""
Turn = Callable[[int], Seconds]
"""One turn with this seed."""


@dataclass(frozen=True)
class Work:
    """What all peers do, as they read it from a file."""

    config: str
    threads: int
    batch: int
    """Prompts of a PPO iteration."""
    prompt_tokens: int
    """Also of each pair's prompt."""
    new_tokens: int
    candidates: int
    """For each prompt of rejection sampling."""
    batch_pairs: int
    prompts: list[list[int]]
    candidate_prompts: list[list[int]]
    pairs: list[list[list[int]]]
    """Chosen and rejected ids, each with the prompt."""
    mixed_pairs: list[list[list[int]]]
    """The same of many lengths."""


class Numbers:
    """Tokenizer and chat format of tokens that mean nothing: a text is the numbers of its tokens, and none ends it."""

    stop_ids = ()

    def stream_decoder(self) -> "Numbers":
        return self

    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def flush(self) -> str:
        return ""

    def encode_prompt(self, messages: Sequence[Any]) -> list[int]:
        return [int(number) for message in messages for number in message.content.split()]

    def encode_dialogue(self, dialogue: Any) -> tuple[list[int], list[bool]]:
        *before, response = (self.encode_prompt([message]) for message in dialogue.messages)
        prompt = [token for turn in before for token in turn]
        return prompt + response, [False] * len(prompt) + [True] * len(response)


def text(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


class Clock:
    """The seconds of a turn and of its parts."""

    def __init__(self) -> None:
        self.seconds: Seconds = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside as a part of the turn."""
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def watch(self, owner: Any, function_name: str, name: str) -> None:
        """Count the time in a function of others as a part from now on."""
        function = getattr(owner, function_name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        setattr(owner, function_name, timed)

    def time(self, run: Callable[[], object]) -> Seconds:
        """All of one run."""
        self.seconds = {}
        with self.part(ALL):
            run()
        return self.seconds


# ---- PPO


def groundup_ppo(num_reward_models: int) -> Callable[[Path, Work], Turn]:
    def make(folder: Path, work: Work) -> Turn:
        from groundup.align.learner import PolicyModels
        from groundup.align.ppo import PARTS, Setup, train_ppo
        from groundup.align.ppo_config import PolicyConfig
        from groundup.align.reward import RewardScorer
        from groundup.align.rollouts import encode_prompts
        from groundup.base.records import Message, Prompt
        from groundup.model.scalar import scalar_from

        format: Any = Numbers()
        records = [Prompt((Message("user", text(ids)),)) for ids in work.prompts]
        prompts = encode_prompts(records, format, work.prompt_tokens, "prompts")
        config = PolicyConfig(
            iterations=2, batch_rows=work.batch, mini_batch_rows=work.batch, max_new_tokens=work.new_tokens,
            missing_eos_penalty=None, compile="on", evaluate_every=None, checkpoint_every_minutes=None,
        )  # fmt: skip

        def turn(seed: int) -> Seconds:
            policy = random_model(work.config)
            models = PolicyModels(policy, copy.deepcopy(policy), scalar_from(policy, 0, "zero"))
            scorer = RewardScorer(*(scalar_from(policy, number) for number in range(num_reward_models)))
            with tempfile.TemporaryDirectory() as scratch:
                setup = Setup(models, scorer, prompts, None, format, format)
                row = train_ppo(setup, config, Path(scratch), seed=seed).last_row
            check(row["length"] == work.new_tokens, f"responses have {row['length']} tokens")
            seconds = work.batch / row["samples_per_second"]
            return {ALL: seconds, **{part: row[f"share_{part}"] * seconds for part in PARTS}}

        return turn

    return make


def trl_ppo(precision: str) -> Callable[[Path, Work], Turn]:
    def make(folder: Path, work: Work) -> Turn:
        if precision == "bf16 autocast":
            os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # what `accelerate launch --mixed_precision` sets
        import torch
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
        policy, reference = (AutoModelForCausalLM.from_pretrained(folder / POLICY, dtype=dtype) for _ in range(2))
        value, reward = (
            AutoModelForSequenceClassification.from_pretrained(folder / REWARD, dtype=dtype) for _ in range(2)
        )
        config = PPOConfig(
            per_device_train_batch_size=work.batch, gradient_accumulation_steps=1, num_mini_batches=1,
            num_ppo_epochs=1, total_episodes=work.batch, response_length=work.new_tokens, temperature=1.0,
            local_rollout_forward_batch_size=work.batch, num_sample_generations=0, kl_coef=0.01, learning_rate=1e-6,
            lr_scheduler_type="constant", **trainer_options(folder, precision),
        )  # fmt: skip
        trainer = PPOTrainer(
            config, pretrained_tokenizer(work, "<pad>"), policy, reference, reward,
            Dataset.from_dict({"input_ids": work.prompts}), value,
        )  # fmt: skip
        clock = Clock()
        clock.watch(ppo_trainer, "batch_generation", "generating")
        first_gradient: list[float] = []
        forward, generate = ppo_trainer.forward, ppo_trainer.batch_generation

        def noticed(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                first_gradient.append(time.perf_counter())
            return forward(*args, **kwargs)

        def checked(*args: Any, **kwargs: Any) -> Any:
            rows, logits = generate(*args, **kwargs)
            check(logits.shape[:2] == (work.batch, work.new_tokens), f"logits {tuple(logits.shape)}")
            return rows, logits

        ppo_trainer.forward, ppo_trainer.batch_generation = noticed, checked

        def turn(seed: int) -> Seconds:
            first_gradient.clear()
            torch.manual_seed(seed)
            found = clock.time(trainer.train)
            training = time.perf_counter() - first_gradient[0]
            scoring = found[ALL] - found["generating"] - training
            return {**found, "scoring": scoring, "training": training}

        return turn

    return make


def trainer_options(folder: Path, precision: str) -> dict[str, Any]:
    """What TRL's trainers are told alike."""
    return {
        "output_dir": str(folder / "trl"), "bf16": precision.startswith("bf16 autocast"), "use_cpu": True,
        "gradient_checkpointing": False, "optim": "adamw_torch_fused", "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


def pretrained_tokenizer(work: Work, padding: str) -> Any:
    """`Numbers` for TRL; `padding` may be a new token, which is none of the model's."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab_size = SHAPES[work.config][0]
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="2", pad_token=padding)


# ---- reward models: one step to warm up, then the time from its end to the end of as many as an epoch has


def groundup_reward(is_mixed: bool) -> Callable[[Path, Work], Turn]:
    def make(folder: Path, work: Work) -> Turn:
        from groundup.base.records import Comparison, Message, Response
        from groundup.data.pairs import ComparisonBatches
        from groundup.model.scalar import scalar_from
        from groundup.train.config import TrainConfig
        from groundup.train.loop import fit
        from groundup.train.reward_loss import reward_loss
        from groundup.train.rl import MARGINS

        chat: Any = Numbers()
        start = work.prompt_tokens
        comparisons = [
            Comparison(
                (Message("user", text(chosen[:start])),), Response(text(chosen[start:])), Response(text(other[start:]))
            )
            for chosen, other in (work.mixed_pairs if is_mixed else work.pairs)
        ]
        context = 2 * len(work.pairs[0][0])
        batches = ComparisonBatches(comparisons, chat, work.batch_pairs, context, 0, margins=MARGINS["small"])
        model = scalar_from(random_model(work.config), 0)
        config = TrainConfig(
            steps=1 + batches.steps_per_epoch, batch_rows=work.batch_pairs, seq_len=context, lr=1e-5, warmup_steps=0,
            compile="on", evaluate_every_steps=1, log_every_steps=1000, checkpoint_every_minutes=None,
        )  # fmt: skip

        def turn(seed: int) -> Seconds:
            ends: list[float] = []

            def note(*_: object) -> dict[str, float]:
                ends.append(time.perf_counter())
                return {}

            with tempfile.TemporaryDirectory() as scratch:
                fit(model, batches, reward_loss(), config, Path(scratch), seed=seed, evaluate=note)
            return {ALL: ends[-1] - ends[0]}

        return turn

    return make


def trl_reward(precision: str, is_mixed: bool = False) -> Callable[[Path, Work], Turn]:
    def make(folder: Path, work: Work) -> Turn:
        import torch
        from datasets import Dataset
        from transformers import AutoModelForSequenceClassification, TrainerCallback
        from trl import RewardConfig, RewardTrainer

        ends: list[float] = []

        class Note(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(time.perf_counter())

        config = RewardConfig(
            per_device_train_batch_size=work.batch_pairs, max_steps=1 + len(work.pairs) // work.batch_pairs,
            learning_rate=1e-5, weight_decay=0.1, torch_compile="compiled" in precision, logging_strategy="no",
            **trainer_options(folder, precision),
        )  # fmt: skip
        pairs = work.mixed_pairs if is_mixed else work.pairs
        chosen, rejected = ([pair[side] for pair in pairs] for side in range(2))
        trainer = RewardTrainer(
            AutoModelForSequenceClassification.from_pretrained(folder / REWARD, dtype=torch.float32), config,
            train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
            processing_class=pretrained_tokenizer(work, "0"), callbacks=[Note()],
        )  # fmt: skip

        def turn(seed: int) -> Seconds:
            ends.clear()
            trainer.train()
            check(len(ends) == config.max_steps, f"{len(ends)} steps instead of {config.max_steps}")
            return {ALL: ends[-1] - ends[0]}

        return turn

    return make


# ---- rejection sampling


def groundup_rejection(folder: Path, work: Work) -> Turn:
    import torch

    from groundup.align.rejection import CandidateConfig, rejection_sample
    from groundup.align.reward import RewardScorer
    from groundup.base.records import Message, Prompt
    from groundup.infer.engine import Engine
    from groundup.model.scalar import scalar_from

    model, format = random_model(work.config), Numbers()
    count = len(work.candidate_prompts) * work.candidates
    engine = Engine(model, format, max_slots=count, weights="bf16")
    scorer = RewardScorer(scalar_from(model, 0).to(torch.bfloat16))
    prompts = [Prompt((Message("user", text(ids)),)) for ids in work.candidate_prompts]
    config = CandidateConfig(num_samples=work.candidates, max_new_tokens=work.new_tokens)
    clock = Clock()
    clock.watch(engine, "generate", "generating")
    clock.watch(scorer, "score", "scoring")

    def turn(seed: int) -> Seconds:
        def run() -> None:
            chat: Any = format
            samples = list(rejection_sample(engine, chat, prompts, scorer, config, temperature=1.0, seed=seed))
            lengths = [candidate.num_tokens for row in samples for candidate in row.candidates]
            check(lengths == [work.new_tokens] * count, f"{len(lengths)} candidates of {set(lengths)} tokens")
            check(all(row.best is not None for row in samples), "prompts without a winner")

        return clock.time(run)

    return turn


def transformers_rejection(dtype_name: str) -> Callable[[Path, Work], Turn]:
    def make(folder: Path, work: Work) -> Turn:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        dtype = getattr(torch, dtype_name)
        model = AutoModelForCausalLM.from_pretrained(folder / POLICY, dtype=dtype).eval()
        reward = AutoModelForSequenceClassification.from_pretrained(folder / REWARD, dtype=dtype).eval()
        model.generation_config.eos_token_id = None
        reward.config.pad_token_id = SHAPES[work.config][0]  # no row holds it: the score is read at the last token
        ids = torch.tensor(work.candidate_prompts)
        clock = Clock()

        @torch.inference_mode()
        def run() -> None:
            with clock.part("generating"):
                rows = model.generate(
                    ids, attention_mask=torch.ones_like(ids), num_return_sequences=work.candidates, do_sample=True,
                    temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work.new_tokens, pad_token_id=0,
                )  # fmt: skip
            with clock.part("scoring"):
                scores = reward(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
            best = scores.view(len(ids), work.candidates).argmax(1)
            expected = (len(ids) * work.candidates, ids.shape[1] + work.new_tokens)
            check(tuple(rows.shape) == expected and len(best) == len(ids), f"rows {tuple(rows.shape)}")

        def turn(seed: int) -> Seconds:
            torch.manual_seed(seed)
            return clock.time(run)

        return turn

    return make


def check(is_right: bool, found: str) -> None:
    if not is_right:
        raise RuntimeError(f"not the work that was asked for: {found}")


OURS = "groundup"
MEASURES: dict[str, dict[str, Callable[[Path, Work], Turn]]] = {
    "ppo": {
        OURS: groundup_ppo(1),
        "groundup, two reward models": groundup_ppo(2),
        "trl fp32": trl_ppo("fp32"),
        "trl bf16 autocast": trl_ppo("bf16 autocast"),
        "trl bf16 weights": trl_ppo("bf16 weights"),
    },
    "reward": {
        OURS: groundup_reward(is_mixed=False),
        "trl fp32": trl_reward("fp32"),
        "trl bf16 autocast": trl_reward("bf16 autocast"),
        "trl bf16 autocast, compiled": trl_reward("bf16 autocast, compiled"),
    },
    "reward-mixed": {
        OURS: groundup_reward(is_mixed=True),
        "trl bf16 autocast": trl_reward("bf16 autocast", is_mixed=True),
    },
    "rejection": {
        OURS: groundup_rejection,
        "transformers fp32": transformers_rejection("float32"),
        "transformers bf16": transformers_rejection("bfloat16"),
    },
}
NEVER_FASTEST = {("reward", "trl fp32"), ("rejection", "transformers fp32")}
