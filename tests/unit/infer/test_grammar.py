"""Grammars: what a random model writes under them, limits, bombs, and constraints in general."""

import dataclasses
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from groundup.base.errors import UserError
from groundup.base.generation import Completion, SamplingParams
from groundup.infer.engine import Engine
from groundup.infer.grammar import GrammarLimits, Grammars
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_int(value) or isinstance(value, float)


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(properties), "additionalProperties": False
    }  # fmt: skip


STRING, INTEGER = {"type": "string", "maxLength": 12}, {"type": "integer", "minimum": -50, "maximum": 50}
NUMBER, BOOLEAN, NULL = {"type": "number", "minimum": 0, "maximum": 9}, {"type": "boolean"}, {"type": "null"}
NODE = {
    "$defs": {"node": record(v=INTEGER, next={"anyOf": [NULL, {"$ref": "#/$defs/node"}]})},
    "$ref": "#/$defs/node",
}


def is_chain(value: Any) -> bool:
    while value is not None:
        if set(value) != {"v", "next"} or not is_int(value["v"]):
            return False
        value = value["next"]
    return True


# Each schema with a direct statement of what fits it.
SCHEMAS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    (STRING, lambda v: isinstance(v, str) and len(v) <= 12),
    ({"type": "string", "minLength": 3, "maxLength": 5}, lambda v: 3 <= len(v) <= 5),
    ({"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, lambda v: bool(re.fullmatch("[A-Z]{2}-[0-9]{3}", v))),
    ({"type": "string", "format": "date"}, lambda v: bool(re.fullmatch(r"\d{4}-\d{2}-\d{2}", v))),
    ({"type": "string", "format": "uuid"}, lambda v: len(v) == 36 and v.count("-") == 4),
    ({"type": "string", "format": "ipv4"}, lambda v: all(0 <= int(part) < 256 for part in v.split("."))),
    (INTEGER, lambda v: is_int(v) and -50 <= v <= 50),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6}, lambda v: v in (4, 5)),
    ({"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 99}, lambda v: is_int(v) and v % 7 == 0),
    (BOOLEAN, lambda v: isinstance(v, bool)),
    (NULL, lambda v: v is None),
    ({"type": ["boolean", "null"]}, lambda v: v is None or isinstance(v, bool)),
    ({"enum": ["red", "grün", "日本", 4, None]}, lambda v: v in ["red", "grün", "日本", 4, None]),
    ({"const": {"a": [1, "é", None]}}, lambda v: v == {"a": [1, "é", None]}),
    ({"const": "naïve 🐢 \"quoted\" \\ \n"}, lambda v: v == "naïve 🐢 \"quoted\" \\ \n"),
    ({"anyOf": [INTEGER, BOOLEAN]}, lambda v: isinstance(v, int)),
    ({"oneOf": [NULL, {"type": "string", "maxLength": 2}]}, lambda v: v is None or len(v) <= 2),
    ({"type": "array", "items": INTEGER, "maxItems": 4}, lambda v: len(v) <= 4 and all(map(is_int, v))),
    ({"type": "array", "items": BOOLEAN, "minItems": 3, "maxItems": 3}, lambda v: len(v) == 3),
    ({"type": "array", "prefixItems": [INTEGER, NULL], "items": False, "minItems": 2}, lambda v: v[1:] == [None]),
    ({"type": "array", "items": {"type": "array", "items": NULL, "maxItems": 2}, "maxItems": 2}, lambda v: len(v) <= 2),
    (record(a=INTEGER), lambda v: set(v) == {"a"} and is_int(v["a"])),
    (record(name=STRING, age=INTEGER, ok=BOOLEAN), lambda v: list(v) == ["name", "age", "ok"]),
    (record(point=record(x=INTEGER, y=INTEGER)), lambda v: set(v["point"]) == {"x", "y"}),
    (record(schlüssel=NULL, ключ=BOOLEAN), lambda v: set(v) == {"schlüssel", "ключ"}),
    ({**record(a=NULL, b=INTEGER), "required": ["b"]}, lambda v: {"b"} <= set(v) <= {"a", "b"}),
    ({"type": "object", "additionalProperties": INTEGER, "maxProperties": 2}, lambda v: len(v) <= 2),
    (record(items={"type": "array", "items": record(q=BOOLEAN), "maxItems": 2}), lambda v: len(v["items"]) <= 2),
    (record(kind={"const": "a"}, of={"anyOf": [record(n=NULL), record(m=NULL)]}), lambda v: len(v["of"]) == 1),
    (NODE, is_chain),
    (record(share=NUMBER), lambda v: is_number(v["share"]) and 0 <= v["share"] <= 9),
]  # fmt: skip


@pytest.fixture(scope="module")
def grammars(real_tokenizer: Tokenizer) -> Iterator[Grammars]:
    found = Grammars(real_tokenizer)
    yield found
    found.close()


@pytest.fixture(scope="module")
def engine(real_tokenizer: Tokenizer) -> Engine:
    """The vocabulary is larger than the tokenizer's, as padded embeddings are."""
    model = Transformer(ModelConfig(real_tokenizer.vocab_size + 24, 16, 1, 2, 2, 8, 32, 512)).eval()
    model.init_weights(1)
    return Engine(model, real_tokenizer, max_slots=16)


def write(engine: Engine, constraint: Any, tokenizer: Tokenizer, **settings: Any) -> list[Completion]:
    params = SamplingParams(
        max_new_tokens=400, num_samples=2, seed=5, constraint=constraint, stop_ids=(tokenizer.eos_id,), temperature=1.5
    )
    return engine.generate([[tokenizer.bos_id, 9]], dataclasses.replace(params, **settings))[0]


def test_thirty_schemas_are_followed(grammars: Grammars, engine: Engine, real_tokenizer: Tokenizer) -> None:
    assert len(SCHEMAS) > 30
    compiled = [grammars.json_schema(schema, (real_tokenizer.eos_id,)) for schema, _ in SCHEMAS]
    params = SamplingParams(400, 1.5, num_samples=2, seed=5, stop_ids=(real_tokenizer.eos_id,), want_logps=True)
    each = [dataclasses.replace(params, constraint=constraint) for constraint in compiled]
    answers = engine.generate([[real_tokenizer.bos_id, 9]] * len(each), each)
    for (schema, fits), samples in zip(SCHEMAS, answers):
        for sample in samples:
            assert sample.finish_reason == "stop", (schema, sample.text)
            assert fits(json.loads(sample.text)), (schema, sample.text)
            assert "\ufffd" not in sample.text
            assert all(np.isfinite(sample.logps))


def test_a_streamed_answer_is_the_same_and_ends_with_the_grammar(
    grammars: Grammars, engine: Engine, real_tokenizer: Tokenizer
) -> None:
    constraint = grammars.json_schema(record(a=INTEGER, b=STRING))
    params = SamplingParams(200, seed=3, constraint=constraint, temperature=2.0)
    (whole,) = engine.generate([[1, 2]], params)[0]
    deltas = list(engine.stream([1, 2], params))
    assert "".join(delta.text for delta in deltas) == whole.text
    assert deltas[-1].finish_reason == whole.finish_reason == "stop"
    assert whole.text.endswith("}")
    assert real_tokenizer.eos_id not in whole.token_ids, "nothing can follow the bracket, so no token is spent on it"


def test_regular_expressions_and_lark_grammars(grammars: Grammars, engine: Engine, real_tokenizer: Tokenizer) -> None:
    for pattern in (r"(ab|é){2,4}/\d{3}", " one| two", r"\p{Lu}{1,3}🐢?"):
        for sample in write(engine, grammars.regex(pattern, (real_tokenizer.eos_id,)), real_tokenizer):
            assert re.fullmatch(pattern.replace(r"\p{Lu}", r"[^\W\d_a-z]"), sample.text), (pattern, sample.text)
            assert sample.finish_reason == "stop"
    lark = 'start: item ("," item)*\nitem: "<" /[0-9]{1,3}/ ">" | "(" start ")"'
    for sample in write(engine, grammars.lark(lark), real_tokenizer, logit_bias=((40, 3.0),)):
        if sample.finish_reason == "stop":
            assert re.fullmatch(r"[<>(),0-9]+", sample.text)
            assert sample.text.count("(") == sample.text.count(")")


def test_the_end_is_any_stop_id_and_only_where_the_grammar_may_end(
    grammars: Grammars, real_tokenizer: Tokenizer
) -> None:
    eos, bos, ordinary = real_tokenizer.eos_id, real_tokenizer.bos_id, real_tokenizer.encode("b")[-1]
    turn = next((i for i in real_tokenizer.control_tokens.values() if i not in (eos, bos)), 0)  # or the unknown token
    constraint = grammars.regex("a{2,4}", (turn, ordinary))()
    written = ""
    for _ in range(6):
        mask = constraint.allowed()
        assert mask is not None
        may_end = len(written.strip()) >= 2
        assert (mask[turn], mask[eos]) == (may_end, may_end)
        assert not mask[bos]
        assert not mask[ordinary], "a stop id that is text is the grammar's business"
        shortest = min(np.flatnonzero(mask), key=lambda token: len(real_tokenizer.token_bytes(token)) or 99)
        written += real_tokenizer.token_bytes(int(shortest)).decode()
        constraint.accept(int(shortest))
        if constraint.is_finished:
            break
    assert constraint.is_finished
    assert written.strip() == "aaaa"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
        ("[" * 20_000, "not valid JSON|nested too deep"),
        ({"type": "wrong"}, "wrong"),
        ({"type": "string", "format": "no such"}, "no such"),
        ({"$ref": "#"}, "nothing fits it"),
        ({"$ref": "http://example.com/schema"}, "example.com"),
        ({"description": "x" * 40_000}, "characters are more than"),
        ({"type": "string", "pattern": "("}, "JSON schema: "),
    ],
)
def test_bad_schemas_are_refused(grammars: Grammars, schema: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grammars.json_schema(schema)


def test_a_schema_may_not_be_nested_without_end(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(40):
        schema = record(a=schema)
    with pytest.raises(UserError, match="deeper than 32"):
        grammars.json_schema(schema)


@pytest.mark.parametrize("pattern", ["(", "a\\", "a{3,1}", "[z-a]", "\\"])
def test_bad_patterns_are_refused(grammars: Grammars, pattern: str) -> None:
    with pytest.raises(UserError, match="regular expression"):
        grammars.regex(pattern)


def bombs() -> list[tuple[str, Any]]:
    """Small grammars that cost much: in compiling, in a step, or in memory."""
    found: list[tuple[str, Any]] = []
    for n in range(40):
        parts = [{"type": "string", "pattern": f".*a.{{{i}}}.*"} for i in range(1, 12 + n % 9)]
        found.append(("json_schema", {"title": str(n), "allOf": parts}))
        found.append(("json_schema", {"type": "integer", "multipleOf": 99_991_000 + 7 * n}))
        found.append(("regex", f"a{{{200_000 + n}}}"))
        found.append(("regex", f"(a+)+b{{{n + 1}}}"))
        found.append(("regex", f"((x{{1,{500 + n}}}){{1,500}}){{1,500}}"))
    return found


@pytest.mark.slow
def test_two_hundred_bombs_neither_hang_nor_stall(real_tokenizer: Tokenizer, engine: Engine) -> None:
    grammars = Grammars(real_tokenizer, GrammarLimits(compile_seconds=0.2))
    outcomes = {"refused": 0, "used": 0}
    for kind, value in bombs():
        try:
            constraint = getattr(grammars, kind)(value)
        except UserError:
            outcomes["refused"] += 1
        else:
            outcomes["used"] += 1
            (sample, _) = write(engine, constraint, real_tokenizer, max_new_tokens=20)
            assert sample.finish_reason in ("stop", "length", "error")
    assert outcomes["refused"] >= 80
    assert outcomes["used"] >= 40, "an expression is not refused for looking dangerous"
    assert len(grammars._known) <= GrammarLimits().max_known
    grammars.close()


def test_a_bomb_is_refused_and_remembered_and_the_next_grammar_works(real_tokenizer: Tokenizer) -> None:
    grammars = Grammars(real_tokenizer, GrammarLimits(compile_seconds=0.05, max_known=2))
    bomb = {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}.*"} for i in range(1, 16)]}
    with pytest.raises(UserError, match="too complex"):
        grammars.json_schema(bomb)
    child = grammars._child
    assert child is not None
    assert child._process is None, "the child ended itself"
    with pytest.raises(UserError, match="too complex"):
        grammars.json_schema(bomb)
    assert child._process is None, "it was not tried again"
    assert grammars.json_schema(NULL)().allowed() is not None
    grammars.json_schema(BOOLEAN)
    grammars.json_schema(INTEGER)
    assert len(grammars._known) == 2
    grammars.close()


def test_many_threads_compile_at_a_time(grammars: Grammars) -> None:
    failed: list[BaseException] = []

    def compile_some(first: int) -> None:
        try:
            for n in range(first, first + 6):
                constraint = grammars.regex(f"x{{{1 + n % 9}}}")()
                assert not constraint.is_finished
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=compile_some, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_without_the_package_the_message_says_what_to_install(
    real_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError) as caught:
        Grammars(real_tokenizer).json_schema(NULL)
    assert "groundup[serve]" in str(caught.value)


class Alternating:
    """Even and odd ids in turn; nothing at all after `length` tokens."""

    def __init__(self, length: int, finishes: bool = False) -> None:
        self.taken: list[int] = []
        self.length, self.finishes = length, finishes

    def allowed(self) -> np.ndarray[Any, np.dtype[np.bool_]] | None:
        if len(self.taken) == self.length:
            return np.zeros(200, dtype=np.bool_)
        return np.arange(200) % 2 == len(self.taken) % 2

    def accept(self, token_id: int) -> None:
        self.taken.append(token_id)

    @property
    def is_finished(self) -> bool:
        return self.finishes and len(self.taken) == self.length


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_any_constraint_holds_whatever_else_is_in_the_batch(
    tiny_model: Transformer, byte_tokenizer: Any, temperature: float
) -> None:
    engine = Engine(tiny_model, byte_tokenizer, max_slots=8)
    made: list[Alternating] = []

    def make() -> Alternating:
        made.append(Alternating(9, finishes=len(made) % 2 == 0))
        return made[-1]

    free = SamplingParams(15, temperature, seed=1, top_p=0.9)
    held = dataclasses.replace(free, constraint=make, num_samples=4, want_logps=True, top_logps=3)
    alone, (together, *_) = engine.generate([[5]], free), engine.generate([[5], [7]], [free, held])
    assert together[0].token_ids == alone[0][0].token_ids
    (samples,) = engine.generate([[7]], held)
    for sample, constraint in zip(samples, made[-4:]):
        assert sample.token_ids == constraint.taken
        assert [token % 2 for token in sample.token_ids] == [n % 2 for n in range(9)]
        assert max(sample.token_ids) < 200, "what lies beyond the mask is not allowed"
        assert sample.finish_reason == ("stop" if constraint.finishes else "error")
        assert all(token % 2 == n % 2 and token < 200 for n, top in enumerate(sample.top_logps) for token, _ in top)
        assert len(sample.text.encode(errors="replace")) > 0
    assert (engine.num_active, engine.num_waiting) == (0, 0)
    deltas = list(engine.stream([7], dataclasses.replace(held, constraint=lambda: Alternating(3), num_samples=1)))
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "error"]
    assert deltas[-1].token_ids == []


def test_log_probabilities_are_those_under_the_constraint(tiny_model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(tiny_model, byte_tokenizer)
    params = SamplingParams(1, 0.8, seed=2, constraint=lambda: Alternating(9), top_logps=260, want_logps=True)
    (answer,) = engine.generate([[4, 5]], params)[0]
    with torch.inference_mode():
        logits = tiny_model.logits(tiny_model(torch.tensor([[4, 5]])))[0, -1].double() / 0.8
    expected = logits[:200:2].log_softmax(-1)
    assert {token for token, _ in answer.top_logps[0]} == set(range(0, 200, 2))
    for token, logp in answer.top_logps[0]:
        assert logp == pytest.approx(expected[token // 2].item(), abs=1e-5)
    assert dict(answer.top_logps[0])[answer.token_ids[0]] == pytest.approx(answer.logps[0], abs=1e-6)
