"""Alignment beside TRL and transformers, on the CPU: one PPO iteration, an epoch of a reward model, rejection sampling.

    python benchmarks/align.py --peer-python PATH [--measure NAME ...] [--peers NAME ...] [--config M] [--rounds 3]

PATH is the interpreter of an environment with torch, trl==1.12.0 (the last with a PPO trainer) and datasets. Every peer
lives in a process of its own for the whole comparison, and the peers take turns, so that a slow minute of the machine
hits all of them. All start from the same random weights and read the same token ids; nothing ends a response before its
last token. A peer's first turn is its warm-up and does not count; nor does what a run does before its first step.

ppo           32 prompts of 32 tokens, 64 new tokens each, 1 epoch, 1 mini-batch; policy, reference, value and reward
              model (ours with two reward models, too, which TRL has not). Ours is the second iteration of `train_ppo`
              by its own log. TRL's parts are told apart by its `batch_generation` and its first forward with gradients.
reward        64 pairs, 32 a step; each response has 128 tokens with its prompt. Ours as `fit` trains them.
reward-mixed  the same with 32 to 128 tokens: ours packs them, TRL pads to the longest of a batch.
rejection     16 candidates of 64 tokens for each of 8 prompts, generated and scored.

The peers differ in how they compute. "fp32": what TRL's PPO does whatever its option `bf16` says. "bf16 autocast": as
its reward trainer does by default; in PPO as under `accelerate launch --mixed_precision bf16`. "bf16 weights": weights
and optimizer in bf16, where at PPO's learning rate nearly all updates round to nothing. Ours is autocast, with weights
and optimizer in float32. TRL's gradient checkpointing, on by default, is off. Peers that are never the fastest of a
measure run when `--peers` names them.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align_peers import ALL, MEASURES, NEVER_FASTEST, OURS, POLICY, REWARD, WORK, Seconds, Turn, Work
from random_models import SHAPES, random_model
from workers import Worker, serve


def headline(measure: str, work: Work) -> tuple[str, str, int]:
    """What is done, the unit of speed, and how many of them a turn makes."""
    if measure == "ppo":
        each = f"{len(work.prompts[0])} + {work.new_tokens} tokens"
        return f"One PPO iteration: {work.batch} responses of {each}", "samples/s", work.batch
    if measure != "rejection":
        pairs = work.pairs if measure == "reward" else work.mixed_pairs
        shortest, *_, longest = sorted(len(row) for pair in pairs for row in pair)
        tokens = f"{shortest} to {longest}" if shortest < longest else str(longest)
        done = f"A reward model's epoch: {len(pairs)} pairs of 2 x {tokens} tokens, {work.batch_pairs} a step"
        return done, "pairs/s", len(pairs)
    count = len(work.candidate_prompts)
    done = f"Rejection sampling: {count} prompts x {work.candidates} candidates of {work.new_tokens} tokens"
    return done, "candidates/s", count * work.candidates


def write_files(folder: Path, work: Work) -> None:
    """The work, and both models as transformers reads them."""
    import torch

    from groundup.model.scalar import scalar_from
    from groundup.model.weights.hf import save_hf

    (folder / WORK).write_text(json.dumps(asdict(work)))
    policy = random_model(work.config)
    reward = scalar_from(policy, 0)
    options: dict[str, Any] = {
        "dtype": torch.float32, "generation": {},
        "token_ids": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None},
    }  # fmt: skip
    save_hf(folder / POLICY, policy.config, policy.state_dict(), **options)
    save_hf(folder / REWARD, reward.config, reward.state_dict(), score=reward.score.weight, **options)


def compare(measure: str, folder: Path, work: Work, rounds: int, peers: list[str] | None, peer_python: str) -> None:
    """Run the peers in turns and print a Markdown table."""
    workers: dict[str, Worker] = {}
    for peer in MEASURES[measure]:
        if (measure, peer) in NEVER_FASTEST if peers is None else peer not in [OURS, *peers]:
            continue
        python = sys.executable if peer.startswith(OURS) else peer_python
        arguments = {"measure": measure, "worker": peer, "folder": folder}
        worker = Worker(__file__, arguments, folder / f"{peer}.log", work.threads, python)
        if worker.missing is None:
            workers[peer] = worker
        else:
            print(f"{peer} is left out: {worker.missing}", flush=True)
    for worker in workers.values():
        worker.ask(0)
    turns: dict[str, list[Seconds]] = {peer: [] for peer in workers}
    for number in range(rounds):
        for peer, worker in workers.items():
            turns[peer].append(worker.ask(number + 1))
    for worker in workers.values():
        worker.close()
    done, unit, count = headline(measure, work)
    parts = [part for part in turns[OURS][0] if part != ALL]
    print(f"\n### {done}; {work.config}, {work.threads} threads, {rounds} rounds\n")
    print(f"| peer | {unit} (median) | min-max | groundup is faster by (min-max) |", end="")
    print("".join(f" {part} s |" for part in parts))
    print("|---|---|---|---|" + "---|" * len(parts))
    for peer, found in turns.items():
        rates = [count / seconds[ALL] for seconds in found]
        ratios = [theirs[ALL] / ours[ALL] for ours, theirs in zip(turns[OURS], found, strict=True)]
        faster = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})" if peer != OURS else ""
        medians = [statistics.median(seconds[part] for seconds in found) for part in parts]
        print(f"| {peer} | {statistics.median(rates):.2f} | {min(rates):.2f}-{max(rates):.2f} | {faster} |", end="")
        print("".join(f" {seconds:.2f} |" for seconds in medians), flush=True)


def draw_work(arguments: argparse.Namespace) -> Work:
    draw = random.Random(0)
    vocab_size = SHAPES[arguments.config][0]

    prompt_tokens, longest = arguments.prompt_tokens, arguments.pair_tokens

    def row(tokens: int) -> list[int]:
        return [draw.randrange(3, vocab_size) for _ in range(tokens)]

    def pair(shortest: int) -> list[list[int]]:
        prompt = row(prompt_tokens)
        return [prompt + row(draw.randint(shortest, longest) - prompt_tokens) for _ in range(2)]

    return Work(
        arguments.config, arguments.threads, arguments.batch, prompt_tokens, arguments.new_tokens,
        arguments.candidates, arguments.batch_pairs,
        prompts=[row(prompt_tokens) for _ in range(4 * arguments.batch)],
        candidate_prompts=[row(prompt_tokens) for _ in range(arguments.candidate_prompts)],
        pairs=[pair(longest) for _ in range(arguments.pairs)],
        mixed_pairs=[pair(prompt_tokens + 1) for _ in range(arguments.pairs)],
    )  # fmt: skip


def start_peer(measure: str, peer: str, folder: Path) -> Turn:
    import torch

    work = Work(**json.loads((folder / WORK).read_text()))
    torch.set_num_threads(work.threads)
    return MEASURES[measure][peer](folder, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--peers", nargs="+", choices=sorted({peer for peers in MEASURES.values() for peer in peers}))
    parser.add_argument("--config", choices=list(SHAPES), default="M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter for TRL and transformers")
    parser.add_argument("--batch", type=int, default=32, help="prompts of a PPO iteration")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of all prompts")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=64, help="pairs of a reward model's epoch")
    parser.add_argument("--batch-pairs", type=int, default=32, help="pairs of one of its steps")
    parser.add_argument("--pair-tokens", type=int, default=128, help="most tokens of a prompt and response")
    parser.add_argument("--candidates", type=int, default=16, help="for each prompt of rejection sampling")
    parser.add_argument("--candidate-prompts", type=int, default=8)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if arguments.worker:
        serve(lambda: start_peer(arguments.measure[0], arguments.worker, arguments.folder))
        return
    work = draw_work(arguments)
    for measure in arguments.measure:
        with tempfile.TemporaryDirectory() as temporary:
            write_files(Path(temporary), work)
            compare(measure, Path(temporary), work, arguments.rounds, arguments.peers, arguments.peer_python)


if __name__ == "__main__":
    main()
