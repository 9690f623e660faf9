"""Untrusted grammars are compiled and tried in a child process first, which ends when they cost too much."""

import json
import select
import subprocess
import sys

WALL_SECONDS = 60.0
"""Ends a child whose own limits did not; generous, because on a busy machine it runs behind everybody else."""


class GrammarChild:
    """Starts the child when it is first needed and again after it has ended; one thread at a time may use it."""

    def __init__(self, tokenizer_json: str, eos_id: int, compile_seconds: float, mask_seconds: float) -> None:
        self._setup = {
            "tokenizer": tokenizer_json, "eos_id": eos_id,
            "compile_seconds": compile_seconds, "mask_seconds": mask_seconds,
        }  # fmt: skip
        self._process: subprocess.Popen[str] | None = None

    def problem_of(self, grammar: str) -> str | None:
        """What is wrong with a grammar, None when it may be used."""
        if self._process is None:
            # -P: nothing of the working directory is imported.
            command = [sys.executable, "-P", "-m", "groundup.infer.grammar_trial"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._send(self._setup)
        self._send(grammar)
        assert self._process.stdout is not None
        is_ready, _, _ = select.select([self._process.stdout], [], [], WALL_SECONDS)
        answer = self._process.stdout.readline() if is_ready else ""
        if not answer:
            self.close()
            return "too complex: it takes too much time or memory to compile"
        problem: str | None = json.loads(answer)
        return problem

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _send(self, message: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading its answer tells
