"""Responses that follow a grammar: a JSON schema, a regular expression or a Lark grammar, through llguidance.

Why limits: a grammar comes from whoever sends a request. llguidance bounds most of its own work, but not all: the
emptiness check of a few patterns under `allOf` (400 bytes of schema) takes it seven seconds, and a mask in the middle
of `a{100000}` a tenth of a second, in which every other response waits. So a new grammar is first compiled and tried in
a child process that ends itself when it has used too much processor time or memory, and a response whose next mask
still takes too long is ended.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from groundup.base.errors import UserError
from groundup.base.generation import Constraint
from groundup.infer.grammar_child import GrammarChild
from groundup.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

WHITESPACE = r"[ \n\t]{0,20}"
"""Between the parts of JSON. Why bounded: a weak model otherwise writes blanks until its tokens are used up."""
WAIT_SECONDS = 10.0
"""How long a new grammar waits for others that are being compiled."""


@dataclass(frozen=True)
class GrammarLimits:
    """What a grammar may cost."""

    max_characters: int = 32_768
    max_depth: int = 32
    """Of a schema's nesting."""
    compile_seconds: float = 0.5
    """Processor time to compile a grammar and to try it."""
    mask_seconds: float = 0.05
    """Processor time to find out what may come next."""
    max_known: int = 32
    """Compiled grammars, and refused ones, that are remembered; each can take up to 20 MB."""


class GrammarConstraint:
    """One response under a compiled grammar."""

    def __init__(self, matcher: "LLMatcher", vocabulary: "_Vocabulary", stop_ids: list[int], seconds: float) -> None:
        self._matcher, self._vocabulary, self._stop_ids, self._seconds = matcher, vocabulary, stop_ids, seconds

    def allowed(self) -> NDArray[np.bool_] | None:
        started = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error() or time.thread_time() - started > self._seconds:
            return np.zeros(len(self._vocabulary.is_text), dtype=np.bool_)
        mask = np.unpackbits(bits, count=len(self._vocabulary.is_text), bitorder="little").view(np.bool_)
        may_end = mask[self._vocabulary.eos_id]
        mask &= self._vocabulary.is_text
        mask[self._stop_ids] = may_end
        return mask

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)

    @property
    def is_finished(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()


class _Vocabulary:
    """A tokenizer as llguidance sees it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = _llguidance().LLTokenizer(tokenizer.json_text, eos_token=tokenizer.eos_id)
        self.eos_id = tokenizer.eos_id
        # Not control tokens, nor the few that we read differently (the unknown token is text there).
        self.is_text = np.array(
            [
                len(tokenizer.token_bytes(token)) > 0
                and self.tokenizer.decode_bytes([token]) == tokenizer.token_bytes(token)
                for token in range(tokenizer.vocab_size)
            ],
            dtype=np.bool_,
        )


class Grammars:
    """Compiles grammars for one tokenizer; usable from many threads.

    What the methods give is a `SamplingParams.constraint`. They take up to some seconds when a grammar is new: call
    them in a thread that nobody waits for. `stop_ids` are the ids that end the response where the grammar allows an
    end.

    Raises: UserError for a grammar that is malformed or costs too much, and where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, limits: GrammarLimits | None = None) -> None:
        self._tokenizer, self._limits = tokenizer, limits or GrammarLimits()
        self._known: OrderedDict[str, LLMatcher | str] = OrderedDict()
        """Grammars compiled, or what is wrong with them; the least recently used one first."""
        self._known_lock, self._compile_lock = threading.Lock(), threading.Lock()
        self._child: GrammarChild | None = None

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        return _Vocabulary(self._tokenizer)

    def json_schema(self, schema: str | Mapping[str, Any], stop_ids: Sequence[int] = ()) -> Callable[[], Constraint]:
        """JSON that fits a schema. The schema {"type": "object"} stands for any JSON object."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            self._check_size(text, "JSON schema")
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise UserError("JSON schema: not valid JSON, or nested too deep") from None
        if not isinstance(value, dict):
            raise UserError("JSON schema: must be an object")
        if _depth(value, self._limits.max_depth) > self._limits.max_depth:
            raise UserError(f"JSON schema: nested deeper than {self._limits.max_depth} levels")
        value["x-guidance"] = {"whitespace_pattern": WHITESPACE}
        return self._constraint({"json_schema": value}, "JSON schema", stop_ids)

    def regex(self, pattern: str, stop_ids: Sequence[int] = ()) -> Callable[[], Constraint]:
        """Text that a regular expression (Rust's syntax) matches from beginning to end."""
        self._check_size(pattern, "regular expression")
        if re.search(r"(?<!\\)(\\\\)*\\$", pattern):
            raise UserError("regular expression: ends with a single backslash")
        text = _llguidance().regex_to_lark(pattern, "")
        return self._constraint({"lark_grammar": f"start: /{text}/"}, "regular expression", stop_ids)

    def lark(self, grammar: str, stop_ids: Sequence[int] = ()) -> Callable[[], Constraint]:
        """Text that follows the rule `start` of a grammar in llguidance's variant of Lark."""
        self._check_size(grammar, "Lark grammar")
        return self._constraint({"lark_grammar": grammar}, "Lark grammar", stop_ids)

    def close(self) -> None:
        """End the child process; it is started again when it is needed."""
        with self._compile_lock:
            if self._child is not None:
                self._child.close()

    def _check_size(self, text: str, kind: str) -> None:
        if len(text) > self._limits.max_characters:
            raise UserError(f"{kind}: {len(text)} characters are more than the {self._limits.max_characters} allowed")

    def _constraint(self, body: dict[str, Any], kind: str, stop_ids: Sequence[int]) -> Callable[[], Constraint]:
        # Decoding takes one space off the front of what a SentencePiece model writes, so the model has to write it.
        space = '" " ' if self._tokenizer.strips_leading_space else ""
        outer = {"lark_grammar": f"start: {space}@body"}
        matcher = self._matcher(json.dumps({"grammars": [outer, {"name": "body", **body}]}), kind)
        vocabulary = self._vocabulary
        ends = [token for token in stop_ids if token < len(vocabulary.is_text) and not vocabulary.is_text[token]]
        ends = sorted({*ends, vocabulary.eos_id})
        return lambda: GrammarConstraint(matcher.deep_copy(), vocabulary, ends, self._limits.mask_seconds)

    def _matcher(self, grammar: str, kind: str) -> "LLMatcher":
        found = self._recall(grammar)
        if found is None:
            if not self._compile_lock.acquire(timeout=WAIT_SECONDS):
                raise UserError(f"{kind}: too many new grammars at a time", "try again later")
            try:
                found = self._recall(grammar)
                if found is None:
                    found = self._compile(grammar)
                    self._remember(grammar, found)
            finally:
                self._compile_lock.release()
        if isinstance(found, str):
            raise UserError(f"{kind}: {found}")
        return found

    def _compile(self, grammar: str) -> "LLMatcher | str":
        llguidance = _llguidance()
        if self._child is None:
            limits = self._limits
            setup = (self._tokenizer.json_text, self._tokenizer.eos_id, limits.compile_seconds, limits.mask_seconds)
            self._child = GrammarChild(*setup)
        problem = self._child.problem_of(grammar)
        if problem is not None:
            return problem
        from groundup.infer.grammar_trial import parser_limits

        matcher: LLMatcher = llguidance.LLMatcher(
            self._vocabulary.tokenizer, grammar, log_level=0, limits=parser_limits()
        )
        assert not matcher.is_error(), "the child process compiled this grammar"
        return matcher

    def _recall(self, grammar: str) -> "LLMatcher | str | None":
        with self._known_lock:
            if grammar in self._known:
                self._known.move_to_end(grammar)
            return self._known.get(grammar)

    def _remember(self, grammar: str, found: "LLMatcher | str") -> None:
        with self._known_lock:
            self._known[grammar] = found
            if len(self._known) > self._limits.max_known:
                self._known.popitem(last=False)


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UserError("grammars need the package llguidance", "pip install 'groundup[serve]'") from None
    return llguidance


def _depth(value: Any, most: int) -> int:
    """How deep a JSON value is nested; it stops counting beyond `most`."""
    depth, level = 0, [value]
    while level and depth <= most:
        depth += 1
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
    return depth
