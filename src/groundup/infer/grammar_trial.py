"""The program of the child process that compiles and tries grammars: see `grammar_child.py`.

The first line it reads holds the tokenizer and the limits; each further line is a grammar, and is answered by what is
wrong with it, or null. When one takes too much processor time or memory, the kernel ends the process.
"""

import json
import os
import random
import resource
import signal
import sys
import time

import llguidance
import numpy as np

MAX_DATA_BYTES = 1 << 30
TRIAL_TOKENS = 48
MAX_MESSAGE = 300


def parser_limits() -> llguidance.LLParserLimits:
    """Choice: a quarter or less of llguidance's own limits; 10,000 lexer states are up to 20 MB."""
    return llguidance.LLParserLimits(
        initial_lexer_fuel=300_000,
        step_lexer_fuel=50_000,
        step_max_items=10_000,
        max_lexer_states=10_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def problem_of(tokenizer: llguidance.LLTokenizer, grammar: str, mask_seconds: float) -> str | None:
    """Compile a grammar and write a random text with it."""
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    draw = random.Random(0)
    for _ in range(TRIAL_TOKENS):
        if matcher.is_error():
            message = matcher.get_error().splitlines()[0][:MAX_MESSAGE]
            return "nothing fits it" if message.startswith("NoExtension") else message
        if matcher.is_stopped():
            return None
        started = time.process_time()
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        if time.process_time() - started > mask_seconds:
            return "too slow to be followed token by token"
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        if len(allowed) == 0:
            return "nothing fits it"
        matcher.consume_token(int(draw.choice(allowed)))
    return None


def main() -> None:
    os.nice(5)  # those who wait for an answer come first
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup = json.loads(sys.stdin.readline())
    tokenizer = llguidance.LLTokenizer(setup["tokenizer"], eos_token=setup["eos_id"])
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_DATA_BYTES, MAX_DATA_BYTES))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, setup["compile_seconds"])  # SIGPROF ends the process
        problem = problem_of(tokenizer, json.loads(line), setup["mask_seconds"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    main()
