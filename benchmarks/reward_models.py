"""Reward models on real comparisons, with SmolLM2-135M-Instruct as their start.

    python benchmarks/reward_models.py accuracy --harmless FILE --llmbar FILE [--train-pairs 600] [--test-pairs 400]
    python benchmarks/reward_models.py margins --rated FILE [FILE ...] [--folds 10] [--repeats 10]

`accuracy` trains on a part of the HH-RLHF harmless transcripts and reports accuracy on other prompts of them and on
LLMBar, beside chance and the longer-is-better baseline.

`margins` compares the margins "none", "small" and "large" on rated comparisons, by rating. Each pair is judged by
models that never saw its prompt; differences are paired, and their intervals come from resampling prompts, because
pairs of one prompt are not independent. With `--train head` the trunk is frozen, so that the hidden state at each score
position is computed once and a fold costs seconds; with `--train whole` every fold and margin is a training run.
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from groundup.base.progress import track
from groundup.base.records import Comparison, Rating
from groundup.data.comparisons import read_comparisons
from groundup.data.pairs import ComparisonBatches, EncodedPair, PairStats, encode_pairs
from groundup.data.sources import get_source
from groundup.data.splits import split_held_out
from groundup.evals.reward import evaluate_scores, score_pairs
from groundup.model.checkpoint import Checkpoint, load_checkpoint
from groundup.model.scalar import ScalarModel, scalar_from
from groundup.train.config import TrainConfig
from groundup.train.loop import choose_precision, fit
from groundup.train.reward_loss import reward_loss
from groundup.train.rl import MARGINS, MarginKind, margin_ranking_loss

START = "smollm2-135m-instruct"
RATINGS = get_args(Rating)
KINDS: tuple[MarginKind, ...] = ("none", "small", "large")
ROWS_AT_ONCE = 16
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Rank = Callable[[MarginKind, NDArray[np.bool_], int], Floats]
"""Margin, which pairs are held out, number of the repeat -> 1 for each held-out pair that is ranked right."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    accuracy = commands.add_parser("accuracy")
    accuracy.add_argument("--harmless", type=Path, required=True)
    accuracy.add_argument("--llmbar", type=Path, required=True)
    accuracy.add_argument("--train-pairs", type=int, default=600)
    accuracy.add_argument("--test-pairs", type=int, default=400)
    accuracy.add_argument("--lr", type=float, default=2e-5)
    accuracy.add_argument("--batch-pairs", type=int, default=32)
    accuracy.add_argument("--tokens", type=int, default=512, help="of the longest prompt and response")
    accuracy.add_argument("--seed", type=int, default=0)
    accuracy.set_defaults(run=compare_accuracy)
    margins = commands.add_parser("margins")
    margins.add_argument("--rated", type=Path, nargs="+", required=True)
    margins.add_argument("--folds", type=int, default=10)
    margins.add_argument("--repeats", type=int, default=10)
    margins.add_argument("--train", choices=("head", "whole"), default="head")
    margins.add_argument(
        "--decay", type=float, nargs="+", default=[0.1], help="weights of |head|^2 / 2 with --train head, one by one"
    )
    margins.add_argument("--lr", type=float, default=2e-5, help="with --train whole")
    margins.add_argument("--batch-pairs", type=int, default=32)
    margins.add_argument("--tokens", type=int, default=512)
    margins.set_defaults(run=compare_margins)
    arguments = parser.parse_args()
    arguments.run(arguments)


def asked(comparison: Comparison) -> str:
    return "\n".join(f"{message.role}: {message.content}" for message in comparison.prompt)


def encode(comparisons: list[Comparison], start: Checkpoint, max_tokens: int, name: str) -> list[EncodedPair]:
    stats = PairStats()
    pairs = encode_pairs(comparisons, start.chat, max_tokens, stats)
    print(f"{name}: {stats.line()}", flush=True)
    return pairs


def compare_accuracy(arguments: argparse.Namespace) -> None:
    start = load_checkpoint(get_source(START), torch.float32)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    harmless = list(read_comparisons(arguments.harmless, criterion="safety"))
    train, held_out = split_held_out(harmless, 0.2, arguments.seed, asked)
    order = np.random.default_rng(arguments.seed).permutation(len(train))[: arguments.train_pairs]
    train, held_out = [train[index] for index in order], held_out[: arguments.test_pairs]
    tests = {
        "HH-RLHF harmless, other prompts": encode(held_out, start, arguments.tokens, "harmless"),
        "LLMBar": encode(list(read_comparisons(arguments.llmbar)), start, arguments.tokens, "LLMBar"),
    }
    model = train_model(start, train, "small", arguments, arguments.seed)
    report(model, tests, device)


def train_model(
    start: Checkpoint, comparisons: list[Comparison], margin: MarginKind, arguments: argparse.Namespace, seed: int
) -> ScalarModel:
    """One epoch, as the stage does it."""
    batches = ComparisonBatches(
        comparisons, start.chat, arguments.batch_pairs, arguments.tokens, seed, margins=MARGINS[margin]
    )
    model = scalar_from(start.model, seed)
    config = TrainConfig(
        epochs=1, batch_rows=arguments.batch_pairs, micro_rows=4, seq_len=arguments.tokens, lr=arguments.lr,
        warmup_steps=min(5, batches.steps_per_epoch // 2), compile="off", checkpoint_every_minutes=None,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        result = fit(model, batches, reward_loss(), config, Path(work), seed=seed, name=f"margin {margin}")
    rate = result.target_tokens / result.seconds
    print(f"{batches.stats.line()}; {rate:.2f} pairs/s over {result.steps} steps", flush=True)
    return model


def report(model: ScalarModel, tests: dict[str, list[EncodedPair]], device: torch.device) -> None:
    for name, pairs in tests.items():
        is_bf16 = choose_precision("auto", device) == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
            found = evaluate_scores(score_pairs(model, pairs))
        own, longer = found["accuracy"], found["longer_is_better"]
        print(
            f"{name}: {share(own)} of {own['count']}; longer is better {share(longer)}; chance 50 %; "
            f"calibration error {found['calibration']['expected_error']:.3f}",
            flush=True,
        )


def share(found: dict[str, float]) -> str:
    return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


def compare_margins(arguments: argparse.Namespace) -> None:
    start = load_checkpoint(get_source(START), torch.float32)
    comparisons = [c for path in arguments.rated for c in read_rated(path) if c.rating is not None]
    pairs = encode(comparisons, start, arguments.tokens, "rated")
    ratings = np.array([pair.comparison.rating for pair in pairs])
    prompts = np.unique([asked(pair.comparison) for pair in pairs], return_inverse=True)[1]
    trained = by_head(start, pairs, arguments) if arguments.train == "head" else by_whole(start, pairs, arguments)
    found = {name: cross_validate(rank, prompts, arguments) for name, rank in trained.items()}
    if len(found) > 1:
        found["mean of these"] = {kind: np.mean([by[kind] for by in found.values()], 0) for kind in KINDS}
    print(f"{arguments.repeats} x {arguments.folds} folds, {prompts.max() + 1} prompts")
    for name, correct in found.items():
        print(f"trained: {name}")
        for rating in (*RATINGS, "all"):
            inside = np.ones(len(pairs), dtype=bool) if rating == "all" else ratings == rating
            if inside.any():
                print(f"  {rating} ({inside.sum()} pairs): {row_of(correct, prompts, inside)}", flush=True)


def read_rated(path: Path) -> list[Comparison]:
    """The comparisons of a file; PandaLM's several JSON lists and FineGrainedRLHF's pairs of four are brought into
    forms that `read_comparisons` knows."""
    raw = path.read_bytes()
    text = gzip.decompress(raw).decode() if path.suffix == ".gz" else raw.decode()
    if not text.startswith("["):
        return list(read_comparisons(path))
    decoder, place, rows = json.JSONDecoder(), 0, []
    while place < len(text.rstrip()):
        found, place = decoder.raw_decode(text, place)
        rows += [row for row in found if any(str(key).startswith("annotator") for key in row)]
        rows += [by_wins(row) for row in found if "prediction 4" in row]
    with tempfile.TemporaryDirectory() as folder:
        one_list = Path(folder) / path.name.removesuffix(".gz")
        one_list.write_text(json.dumps(rows))
        return list(read_comparisons(one_list))


def by_wins(row: dict[str, Any]) -> dict[str, Any]:
    """FineGrainedRLHF: each of four answers was compared with each other one (0: no difference, 1: the first is better,
    2: the second). An answer's score, from 0 to 4, grows with its wins less its losses, so that gaps are ratings."""
    wins = [0] * 4
    for (first, second), verdict in zip(combinations(range(4), 2), row["preference"], strict=True):
        gain = {0: 0, 1: 1, 2: -1}[verdict]
        wins[first] += gain
        wins[second] -= gain
    answers = [{"response": row[f"prediction {n + 1}"], "helpfulness": 2 + wins[n] * 2 / 3} for n in range(4)]
    return {"prompt": row["question"], "responses": answers}


def cross_validate(rank: Rank, prompts: Ints, arguments: argparse.Namespace) -> dict[MarginKind, Floats]:
    """How often each pair is ranked right by models that did not see its prompt. Shapes: prompts (P,) -> (P,) each."""
    correct = {kind: np.zeros(len(prompts)) for kind in KINDS}
    for repeat in range(arguments.repeats):
        fold_of_prompt = np.random.default_rng(repeat).integers(arguments.folds, size=prompts.max() + 1)
        for fold in range(arguments.folds):
            is_test = fold_of_prompt[prompts] == fold
            for kind in KINDS:
                correct[kind][is_test] += rank(kind, is_test, repeat) / arguments.repeats
    return correct


def by_head(start: Checkpoint, pairs: list[EncodedPair], arguments: argparse.Namespace) -> dict[str, Rank]:
    """Only the score head learns, on the differences of the (scaled) states of chosen and rejected responses."""
    difference = score_states(start, pairs).diff(dim=1).neg().squeeze(1)  # (P, D): chosen - rejected
    difference = difference / difference.square().mean(0).sqrt()
    ratings = [pair.comparison.rating for pair in pairs]
    margins = {kind: torch.tensor([MARGINS[kind][r] for r in ratings if r is not None]) for kind in KINDS}

    def rank(decay: float, kind: MarginKind, is_test: NDArray[np.bool_], repeat: int) -> Floats:
        held_out = torch.from_numpy(is_test)
        head = fit_head(difference[~held_out], margins[kind][~held_out], decay)
        return (difference[held_out] @ head > 0).double().numpy()

    return {f"head, decay {decay}": partial(rank, decay) for decay in arguments.decay}


def by_whole(start: Checkpoint, pairs: list[EncodedPair], arguments: argparse.Namespace) -> dict[str, Rank]:
    """All weights learn; the margins of one fold and repeat share the seed, and so head, batches and order."""

    def rank(kind: MarginKind, is_test: NDArray[np.bool_], repeat: int) -> Floats:
        train = [pair.comparison for pair, held_out in zip(pairs, is_test, strict=True) if not held_out]
        model = train_model(start, train, kind, arguments, seed=repeat)
        return score_pairs(model, [pair for pair, held_out in zip(pairs, is_test, strict=True) if held_out]).correct

    return {"whole": rank}


def fit_head(difference: Tensor, margins: Tensor, decay: float) -> Tensor:
    """The head that minimises the mean ranking loss plus decay / 2 * |head|^2, a convex problem: no seed, no steps."""
    head = torch.zeros(difference.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = margin_ranking_loss(difference @ head, torch.zeros(()), margins).mean()
        loss = loss + decay / 2 * head.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.detach()


@torch.inference_mode()
def score_states(start: Checkpoint, pairs: list[EncodedPair]) -> Tensor:
    """The hidden state at each score position, in bfloat16 where the machine has it. Shapes: (P, 2, D) float32."""
    is_bf16 = choose_precision("auto", torch.device("cpu")) == "bf16"
    model = start.model.to(torch.bfloat16 if is_bf16 else torch.float32)
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    states = torch.empty(len(rows), start.config.dim)
    for first in track(range(0, len(rows), ROWS_AT_ONCE), "hidden states", unit="batches"):
        group = order[first : first + ROWS_AT_ONCE]
        tokens = pad_sequence([torch.from_numpy(rows[i].astype(np.int64)) for i in group], batch_first=True)
        last = torch.tensor([len(rows[i]) - 1 for i in group])
        states[group] = model(tokens)[torch.arange(len(group)), last].float()
    return states.view(len(pairs), 2, -1)


def row_of(correct: dict[MarginKind, Floats], prompts: Ints, inside: NDArray[np.bool_]) -> str:
    parts = [f"{kind} {correct[kind][inside].mean():.2%}" for kind in KINDS]
    for kind in KINDS[1:]:
        gain = (correct[kind] - correct["none"])[inside]
        low, high = interval(gain, prompts[inside])
        parts.append(f"{kind} - none {gain.mean():+.2%} ({low:+.2%} to {high:+.2%})")
    return "; ".join(parts)


def interval(gain: Floats, prompts: Ints) -> tuple[float, float]:
    """95 % interval of a mean, by resampling whole prompts."""
    clusters = np.unique(prompts, return_inverse=True)[1]
    sums, sizes = np.bincount(clusters, gain), np.bincount(clusters)
    drawn = np.random.default_rng(0).integers(len(sums), size=(5000, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    main()
