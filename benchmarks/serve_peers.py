"""The servers that benchmarks/serve.py compares, each in a process of its own.

Run as a script, this file is one of them: llama.cpp's own HTTP server, as xllamacpp brings it.
"""

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = 512
"""Tokens of a slot, prompt and answer together."""
OURS, THEIRS = "groundup", "llama.cpp"
START_SECONDS = 180


@dataclass(frozen=True)
class Setting:
    """What the servers are started with."""

    folder: Path
    """Holds the model as `hf/` and, for each precision, as a GGUF file."""
    slots: int
    threads: int


class Server:
    """A server in a process of its own. `missing` says why it did not start; None: it did."""

    def __init__(self, name: str, command: list[str], log: Path, threads: int) -> None:
        self.name = name
        self.port = free_port()
        self.log = log
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)], stdout=output, stderr=output, env=environment
            )
        self.missing = self._wait()

    def _wait(self) -> str | None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if self.process.poll() is not None:
                return f"it ended: {self.log.read_text()[-1000:]}"
            try:
                self.get("/health")
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
            else:
                return None
        self.close()
        return f"it did not answer in {START_SECONDS} s: {self.log.read_text()[-1000:]}"

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)

    @functools.cached_property
    def model(self) -> str:
        return str(self.get("/v1/models")["data"][0]["id"])

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ours(precision: str, setting: Setting) -> Server:
    command = [sys.executable, "-c", "from groundup.cli import main; main()", "serve", str(setting.folder / "hf")]
    options = ["--weights", precision, "--slots", str(setting.slots), "--max-tokens", str(CONTEXT)]
    return Server(OURS, [*command, *options], setting.folder / f"{OURS}-{precision}.log", setting.threads)


def start_theirs(precision: str, setting: Setting, python: str) -> Server:
    command = [python, __file__, str(setting.folder / f"{precision}.gguf")]
    options = ["--slots", str(setting.slots), "--threads", str(setting.threads)]
    return Server(THEIRS, [*command, *options], setting.folder / f"{THEIRS}-{precision}.log", setting.threads)


def run_llama_cpp(model: str, port: int, slots: int, threads: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.ui = model, port, False
    params.n_parallel, params.n_ctx, params.n_gpu_layers = slots, slots * CONTEXT, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(3600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    for name in ("--port", "--slots", "--threads"):
        parser.add_argument(name, type=int, required=True)
    arguments = parser.parse_args()
    run_llama_cpp(arguments.model, arguments.port, arguments.slots, arguments.threads)


if __name__ == "__main__":
    main()
