"""Serving beside llama.cpp's server: total throughput, and how long people wait.

    python benchmarks/serve.py --peer-python PATH [--model smollm2 S M] [--precision bf16 int8 fp32]
        [--users 1 4 16 32] [--rounds 2] [--seconds 4] [--rates 0.5 0.8 1 1.2] [--open-rounds 1] [--open-seconds 10]
        [--quick]

PATH is the interpreter of an environment with xllamacpp, which runs llama.cpp's own HTTP server. Every server is a
process of its own for the whole comparison; they take turns, so that a slow minute of the machine hits all of them, and
never are two of them busy at once. All get the same requests at the same moments: POST /v1/completions with token ids,
greedy, streamed. Prompts are random ids that share nothing, so that no cache of prompts helps or costs; lengths are
log-normal, 48 tokens of prompt in the median (8 to 256) and 48 new ones (16 to 128). The weights with which stop tokens
would be predicted are zero, so that each answer has exactly as many tokens as were asked for; an answer with other
numbers of tokens, or any error, ends the benchmark. Both servers have as many slots as there are users at most, the
same context and the same number of threads. llama.cpp's cache of past prompts in memory is off: here it only costs.

Closed loop: so many users, each asking again at once. Tokens are counted that arrive in a window of --seconds after
half as long to get going.

Open loop, with the first of the precisions: requests arrive at random (Poisson). The rates are shares of the requests a
second that llama.cpp's server answered with the most users in this run (without llama.cpp: that groundup answered), so
that both servers get the same load. Time to the first token counts from the moment at which the request was due, queue
and all. Goodput: answers a second that kept both limits, --first-token-limit and --token-limit. Requests that come
before the --open-seconds that count, in a third as long, are only there to fill the slots. Percentiles are over all
rounds.

The client runs on the same machine; how much of it the client takes is stated beside the numbers.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from load import Load, Request, Target, closed_loop, open_loop
from random_models import SHAPES, write_gguf
from serve_peers import OURS, THEIRS, Server, Setting, start_ours, start_theirs

PROMPT_TOKENS = (48, 0.7, 8, 256)
"""Median, sigma of the logarithm, least and most."""
NEW_TOKENS = (48, 0.5, 16, 128)
GGUF_TYPES = {"bf16": "bf16", "int8": "q8_0", "fp32": "f32"}
REAL_MODEL = "smollm2-135m-instruct"


# ---- the work


def write_model(name: str, folder: Path, precisions: list[str]) -> None:
    """The model as both servers read it, without the weights that predict stop tokens."""
    import torch

    from groundup.data.sources import get_source
    from groundup.model.checkpoint import convert, load_checkpoint, save_checkpoint

    source = folder / "source.gguf"
    if name in SHAPES:
        write_gguf(name, source, "f32")
    checkpoint = load_checkpoint(source if name in SHAPES else get_source(REAL_MODEL), torch.bfloat16)
    with torch.no_grad():
        checkpoint.model.head_weight[[checkpoint.tokenizer.eos_id, *checkpoint.chat.stop_ids]] = 0
    save_checkpoint(folder / "hf", checkpoint)
    for precision in precisions:
        convert(folder / "hf", folder / f"{precision}.gguf", "gguf", quantisation=GGUF_TYPES[precision])


def requests(server: Server, vocab_size: int, seed: int) -> Iterator[Request]:
    """The same for all servers: lengths and ids are drawn from the seed."""
    draw = random.Random(seed)

    def length(median: int, sigma: float, least: int, most: int) -> int:
        return min(max(round(median * draw.lognormvariate(0, sigma)), least), most)

    while True:
        prompt = [draw.randrange(300, vocab_size) for _ in range(length(*PROMPT_TOKENS))]
        new_tokens = length(*NEW_TOKENS)
        body = {"model": server.model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        yield Request(json.dumps({**body, **stream}).encode(), new_tokens)


# ---- the comparison


@dataclass(frozen=True)
class Plan:
    users: list[int]
    rounds: int
    seconds: float
    rates: list[float]
    open_rounds: int
    open_seconds: float
    first_token_limit: float
    token_limit: float


def target(server: Server) -> Target:
    return Target("127.0.0.1", server.port, pid=server.process.pid)


def checked(load: Load, server: Server) -> Load:
    """Refusals are an answer under overload; anything else that is not a whole answer is an error."""
    broken = [answer.failure for answer in load.answers if answer.failure not in (None, "refused")]
    if broken:
        raise RuntimeError(f"{server.name}: {len(broken)} of {len(load.answers)} requests failed, e.g. {broken[0]}")
    return load


def measure_closed(servers: list[Server], vocab_size: int, plan: Plan) -> dict[tuple[str, int], list[Load]]:
    loads: dict[tuple[str, int], list[Load]] = {}
    for server in servers:  # warm-up
        closed_loop(target(server), requests(server, vocab_size, 0), max(plan.users), 0, plan.seconds / 2)
    for number, users in itertools.product(range(plan.rounds), plan.users):
        for server in servers:
            ready = itertools.islice(requests(server, vocab_size, 1000 * (number + 1) + users), 4000)
            load = closed_loop(target(server), iter(list(ready)), users, plan.seconds / 2, plan.seconds)
            loads.setdefault((server.name, users), []).append(checked(load, server))
    return loads


def measure_open(
    servers: list[Server], vocab_size: int, plan: Plan, capacity: float
) -> dict[tuple[str, float], list[Load]]:
    loads: dict[tuple[str, float], list[Load]] = {}
    for number, share in itertools.product(range(plan.open_rounds), plan.rates):
        seed = 1000 * (number + 1) + round(100 * share)
        for server in servers:
            work = requests(server, vocab_size, seed + 500)
            load = open_loop(target(server), work, share * capacity, plan.open_seconds / 3, plan.open_seconds, seed)
            loads.setdefault((server.name, share), []).append(checked(load, server))
    return loads


def requests_per_second(load: Load) -> float:
    """From tokens, because few requests end inside a window."""
    tokens = [answer.tokens for answer in load.answers if answer.tokens]
    return load.tokens_per_second() / statistics.mean(tokens)


def print_closed(title: str, loads: dict[tuple[str, int], list[Load]], plan: Plan) -> None:
    print(f"\n### {title}, closed loop\n")
    print("| tokens/s with so many users |", *(f" {users} |" for users in plan.users), sep="")
    print("|---|" + "---|" * len(plan.users))
    names = list(dict.fromkeys(name for name, _ in loads))
    rates = {key: [load.tokens_per_second() for load in found] for key, found in loads.items()}
    for name in names:
        cells = []
        for users in plan.users:
            values = rates[name, users]
            cell = f"{statistics.median(values):.0f} ({min(values):.0f}-{max(values):.0f})"
            if name == OURS and THEIRS in names:
                pairs = zip(values, rates[THEIRS, users], strict=True)
                cell += f", {statistics.median(ours / theirs for ours, theirs in pairs):.2f}x"
            cells.append(cell)
        print(f"| {name} |", *(f" {cell} |" for cell in cells), sep="")
    shares = [(load.client_share, load.server_share or 0) for found in loads.values() for load in found]
    clients, servers = zip(*shares, strict=True)
    print(f"\nCores used: client {min(clients):.2f}-{max(clients):.2f}, servers {min(servers):.2f}-{max(servers):.2f}.")


def percentiles(values: list[float], scale: float, digits: int) -> str:
    if not values:
        return "none"
    return " / ".join(f"{value * scale:.{digits}f}" for value in np.percentile(values, [50, 90, 99]))


def print_open(title: str, loads: dict[tuple[str, float], list[Load]], plan: Plan, capacity: float) -> None:
    print(f"\n### {title}, open loop; 100 % is {capacity:.2f} requests/s\n")
    waits = "first token s, p50 / p90 / p99 | ms a token, p50 / p90 / p99"
    print(f"| rate | server | requests, refused | {waits} | tokens/s | goodput, requests/s | client's cores |")
    print("|---" * 8 + "|")
    for share, name in itertools.product(plan.rates, dict.fromkeys(name for name, _ in loads)):
        found = loads[name, share]
        counted = [answer for load in found for answer in load.counted()]
        whole = [answer for answer in counted if answer.failure is None]
        good = sum(
            answer.first_token_seconds <= plan.first_token_limit and answer.seconds_per_token <= plan.token_limit
            for answer in whole
        )
        cells = [
            f"{share:.0%}",
            name,
            f"{len(counted)}, {len(counted) - len(whole)}",
            percentiles([answer.first_token_seconds for answer in whole], 1, 2),
            percentiles([answer.seconds_per_token for answer in whole], 1000, 0),
            f"{statistics.median(load.tokens_per_second() for load in found):.0f}",
            f"{good / sum(load.end - load.start for load in found):.2f} ({good / max(len(counted), 1):.0%})",
            f"{max(load.client_share for load in found):.2f}",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def compare(name: str, precision: str, setting: Setting, plan: Plan, python: str | None, with_open_loop: bool) -> None:
    """Run both servers in turns and print Markdown tables."""
    started = [start_ours(precision, setting)]
    if python is not None:
        started.append(start_theirs(precision, setting, python))
    for server in started:
        if server.missing is not None:
            print(f"{server.name} is left out: {server.missing}", flush=True)
    servers = [server for server in started if server.missing is None]
    try:
        vocab_size = json.loads((setting.folder / "hf" / "config.json").read_text())["vocab_size"]
        title = f"{name} {precision}, {setting.threads} threads, {plan.rounds} rounds"
        closed = measure_closed(servers, vocab_size, plan)
        print_closed(title, closed, plan)
        if with_open_loop:
            yardstick = closed[servers[-1].name, max(plan.users)]
            capacity = statistics.median(requests_per_second(load) for load in yardstick)
            print_open(title, measure_open(servers, vocab_size, plan, capacity), plan, capacity)
    finally:
        for server in servers:
            server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=["smollm2", *SHAPES], default=["smollm2"])
    parser.add_argument("--precision", nargs="+", choices=list(GGUF_TYPES), default=list(GGUF_TYPES))
    parser.add_argument("--users", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--rates", nargs="*", type=float, default=[0.5, 0.8, 1.0, 1.2])
    parser.add_argument("--open-rounds", type=int, default=1)
    parser.add_argument("--open-seconds", type=float, default=10)
    parser.add_argument("--first-token-limit", type=float, default=2, help="seconds")
    parser.add_argument("--token-limit", type=float, default=0.1, help="seconds")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peer-python", help="interpreter with xllamacpp; without it groundup runs alone")
    parser.add_argument("--quick", action="store_true", help="bf16 only, 16 and 32 users, two rates, one round")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.precision, arguments.users, arguments.rates, arguments.rounds = ["bf16"], [16, 32], [0.8, 1.2], 1
    plan = Plan(
        sorted(arguments.users), arguments.rounds, arguments.seconds,
        arguments.rates, arguments.open_rounds, arguments.open_seconds,
        arguments.first_token_limit, arguments.token_limit,
    )  # fmt: skip
    for name in arguments.model:
        with tempfile.TemporaryDirectory() as temporary:
            setting = Setting(Path(temporary), max(plan.users), arguments.threads)
            write_model(name, setting.folder, arguments.precision)
            for precision in arguments.precision:
                with_open_loop = precision == arguments.precision[0]
                compare(name, precision, setting, plan, arguments.peer_python, with_open_loop)


if __name__ == "__main__":
    main()
