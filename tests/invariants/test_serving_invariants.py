"""What a client may rely on however busy the engine is: the same ids, and the same text streamed or not."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from groundup.base.generation import SamplingParams
from groundup.infer.engine import Engine
from groundup.model.checkpoint import load_checkpoint
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.text.tokenizer import Tokenizer, train_tokenizer

GREEDY = SamplingParams(max_new_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece with byte fallback, which knows neither emoji nor Chinese."""
    texts = ["the turtle said: stop, and naïve café words wandered on and on. " * 20]
    return train_tokenizer(texts, 380, tmp_path_factory.mktemp("tokenizer"), 0)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    model = Transformer(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 64, 160)).eval()
    model.init_weights(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def many_prompts(count: int, vocab_size: int) -> list[list[int]]:
    """A third of them begin alike, so that prefixes are shared."""
    draw = random.Random(1)
    stem = [draw.randrange(vocab_size) for _ in range(40)]
    return [
        (stem[: draw.randrange(16, 40)] if n % 3 == 0 else [])
        + [draw.randrange(vocab_size) for _ in range(draw.randrange(1, 90))]
        for n in range(count)
    ]


def submitted(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """All at once."""
    order = [engine.submit(prompt, params) for prompt in prompts]
    ids: dict[int, list[int]] = {request: [] for request in order}
    while engine.num_active or engine.num_waiting:
        for delta in engine.step():
            ids[delta.request_id] += delta.token_ids
    return [ids[request] for request in order]


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_greedy_answers_do_not_depend_on_anything_else(model: Transformer, tokenizer: Tokenizer, count: int) -> None:
    prompts = many_prompts(count, tokenizer.vocab_size)
    single = Engine(model, tokenizer, max_slots=1)
    alone = [samples[0].token_ids for prompt in prompts for samples in single.generate([prompt], GREEDY)]
    assert len({tuple(ids) for ids in alone}) > count / 2
    busy = Engine(model, tokenizer, max_slots=16, prefill_chunk=512)
    assert submitted(busy, prompts, GREEDY) == alone, "with 15 neighbours, in used slots"
    reused = busy.reused_tokens
    assert reused > 0
    assert submitted(busy, prompts, GREEDY) == alone, "with a warm prefix cache"
    chunked = Engine(model, tokenizer, max_slots=16, prefill_chunk=24)
    assert submitted(chunked, prompts, GREEDY) == alone, "in chunks"
    offline = Engine(model, tokenizer, max_slots=16)
    assert [samples[0].token_ids for samples in offline.generate(prompts, GREEDY)] == alone, "offline"


class Dictated:
    """Forces the response to be these tokens."""

    def __init__(self, ids: list[int], vocab_size: int) -> None:
        self._rest, self._mask = iter(ids), np.zeros(vocab_size, dtype=np.bool_)
        self._left = len(ids)

    def allowed(self) -> NDArray[np.bool_]:
        self._mask[:] = False
        self._mask[next(self._rest)] = True
        return self._mask

    def accept(self, token_id: int) -> None:
        self._left -= 1

    @property
    def is_finished(self) -> bool:
        return self._left == 0


PIECES = [
    "🐢",
    "👩‍👩‍👧",
    "日本語",
    "é",
    "naïve ",
    "stop",
    "the ",
    ", ",
    "turtle",
    "\n",
    "🇩🇪",
    "  ",
    "ab",
    "a",
    "x\u0301",
    "\ufffd",
]


def cases(count: int, tokenizer: Tokenizer) -> Iterator[tuple[list[int], tuple[str, ...]]]:
    """Tokens of a response and its stop strings, most of which are in it, across the borders of tokens."""
    draw = random.Random(2)
    for number in range(count):
        text = "".join(draw.choices(PIECES, k=draw.randrange(3, 9)))
        ids = tokenizer.encode(text)
        if number % 5 == 0:  # any bytes at all, mostly no valid UTF-8
            ids = [draw.randrange(3, tokenizer.vocab_size) for _ in range(12)]
            text = tokenizer.decode(ids)
        stops = []
        for _ in range(draw.randrange(3)):
            start = draw.randrange(len(text))
            stops.append(text[start : start + draw.randrange(1, 5)])
        if draw.random() < 0.3:
            stops.append(draw.choice(["never there", "🐢🐢🐢", "stopp"]))
        yield ids, tuple(stops)


def expected_text(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text up to the first stop string at the first token that completes one; the slow way."""
    for count in range(1, len(ids) + 1):
        decoder = tokenizer.stream_decoder()
        text = "".join(decoder.push(token) for token in ids[:count])
        if count == len(ids):
            text += decoder.flush()
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)], True
    return tokenizer.decode(ids), False


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_streams_equal_their_unstreamed_text(model: Transformer, tokenizer: Tokenizer, count: int) -> None:
    engine = Engine(model, tokenizer, max_slots=16)
    all_cases = list(cases(count, tokenizer))
    each = [
        SamplingParams(150, 0.0, stop=stops, constraint=lambda ids=ids: Dictated(ids, tokenizer.vocab_size))
        for ids, stops in all_cases
    ]
    prompts = [[1, 3 + n % 200] for n in range(count)]
    whole = [samples[0] for samples in engine.generate(prompts, each)]
    requests = [engine.submit(prompt, params) for prompt, params in zip(prompts, each)]
    pieces: dict[int, list[str]] = {request: [] for request in requests}
    reasons = {}
    while engine.num_active or engine.num_waiting:
        for delta in engine.step():
            pieces[delta.request_id].append(delta.text)
            if delta.finish_reason is not None:
                reasons[delta.request_id] = delta.finish_reason
    num_stopped = num_multibyte = 0
    for (ids, stops), completion, request in zip(all_cases, whole, requests):
        text, is_stopped = expected_text(tokenizer, ids, stops)
        assert completion.text == text == "".join(pieces[request]), (ids, stops)
        assert completion.finish_reason == reasons[request] == "stop"
        assert completion.token_ids == ids[: len(completion.token_ids)]
        assert not any(stop in text for stop in stops)
        assert text.count("\ufffd") <= tokenizer.decode(ids).count("\ufffd")
        num_stopped += is_stopped
        num_multibyte += any(len(piece.encode()) > 3 for piece in pieces[request])
    assert num_stopped > count / 4
    assert num_multibyte > count / 4


def test_a_secret_prompt_leaves_no_trace(model: Transformer, tokenizer: Tokenizer) -> None:
    """Canaries: the log-probabilities of an answer are those it has in a fresh engine, whatever lay in its slot."""
    draw = random.Random(3)
    engine = Engine(model, tokenizer, max_slots=4, prefill_chunk=16)
    params = dataclasses.replace(GREEDY, want_logps=True)
    for _ in range(8):
        prompt = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 40))]
        fresh = Engine(model, tokenizer).generate([prompt], params)[0][0]
        secrets = [[draw.randrange(tokenizer.vocab_size)] * draw.randrange(1, 120) for _ in range(5)]
        for secret in secrets:
            engine.submit(secret, GREEDY)
        request = engine.submit(prompt, params)
        logps = []
        while engine.num_active or engine.num_waiting:
            logps += [logp for delta in engine.step() if delta.request_id == request for logp in delta.logps]
        assert logps == pytest.approx(fresh.logps, abs=1e-5)


def test_prompts_of_real_text_survive_any_chunk(shared_data: Path) -> None:
    """stories260K: a story cut anywhere goes on in the same way, whatever the chunk."""
    checkpoint = load_checkpoint(shared_data / "models" / "stories260K.bin")
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 3
    prompt = [checkpoint.tokenizer.bos_id, *checkpoint.tokenizer.encode(text)]
    params = SamplingParams(max_new_tokens=30, temperature=0)
    (whole,) = Engine(checkpoint.model, checkpoint.tokenizer).generate([prompt], params)[0]
    for chunk in (3, 17, 64):
        engine = Engine(checkpoint.model, checkpoint.tokenizer, prefill_chunk=chunk)
        assert "".join(delta.text for delta in engine.stream(prompt, params)) == whole.text
