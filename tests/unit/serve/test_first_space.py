"""The space that a tokenizer takes away at the start of a text comes back, and stop strings see it."""

import asyncio
import codecs
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundup.base.generation import Delta, FinishReason, SamplingParams
from groundup.infer.text import ResponseText
from groundup.serve.backend import cached_tokens_of
from groundup.serve.first_space import FirstSpace
from groundup.text.tokenizer import Tokenizer, train_tokenizer

EOS = 2
TEXTS = ["the small dog sees a green river near the old house"] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece with bytes; it puts a space before every text."""
    return train_tokenizer(TEXTS, 370, tmp_path_factory.mktemp("tokenizer"), 0)


class Engine(AsyncIterator[Delta]):
    """Says each sample's tokens, and finds stop strings, as an engine does that knows nothing of the first space."""

    cached_tokens = 7

    def __init__(self, tokenizer: Tokenizer, samples: Sequence[Sequence[int]], params: SamplingParams) -> None:
        self._deltas = self._all(tokenizer, samples, params)
        self.num_given = 0
        self.is_closed = False

    async def __anext__(self) -> Delta:
        try:
            delta = next(self._deltas)
        except StopIteration:
            raise StopAsyncIteration from None
        self.num_given += 1
        return delta

    async def aclose(self) -> None:
        self.is_closed = True

    def _all(self, tokenizer, samples, params):  # type: ignore[no-untyped-def]
        texts = [ResponseText(tokenizer.stream_decoder(), params.stop) for _ in samples]
        is_open = [True] * len(samples)
        for place in range(max(map(len, samples))):
            for sample, ids in enumerate(samples):
                if not is_open[sample]:
                    continue
                is_eos = ids[place] in params.stop_ids
                text = "" if is_eos else texts[sample].push(ids[place])
                reason: FinishReason | None = None
                if is_eos or texts[sample].is_stopped or place + 1 == len(ids):
                    text += texts[sample].finish()
                    reason = "stop" if is_eos or texts[sample].is_stopped else "length"
                    is_open[sample] = False
                yield Delta(0, sample, text, [ids[place]], [], reason)


def heard(
    tokenizer: Tokenizer, samples: Sequence[Sequence[int]], *stop: str
) -> tuple[list[tuple[str, FinishReason | None]], Engine]:
    params = SamplingParams(num_samples=len(samples), stop=stop, stop_ids=(EOS,))
    engine = Engine(tokenizer, samples, params)
    texts, reasons = [""] * len(samples), [None] * len(samples)  # type: list[str], list[FinishReason | None]

    async def listen() -> None:
        stream = FirstSpace(engine, tokenizer, params)
        async for delta in stream:
            assert reasons[delta.sample] is None, "nothing follows the end"
            texts[delta.sample] += delta.text
            reasons[delta.sample] = delta.finish_reason
        assert cached_tokens_of(stream) == 7
        await stream.aclose()

    asyncio.run(listen())
    assert engine.is_closed
    return list(zip(texts, reasons, strict=True)), engine


def expected(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str]) -> tuple[str, str]:
    """The slow way: the text of the tokens, up to the first stop string at the first token that completes one."""
    for count in range(1, len(ids) + 1):
        is_last = count == len(ids) or ids[count - 1] == EOS
        raw = b"".join(tokenizer.token_bytes(token) for token in ids[:count] if token != EOS)
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(raw, is_last)
        found = [text.index(each) for each in stop if each in text]
        if found:
            return text[: min(found)], "stop"
        if is_last:
            return text, "stop" if ids[count - 1] == EOS else "length"
    raise AssertionError("no token at all")


@pytest.mark.parametrize(
    ("text", "stop", "said"),
    [
        ("the small dog", (), (" the small dog", "length")),
        ("the small dog", (" the",), ("", "stop")),
        ("the small dog", (" the small",), ("", "stop")),
        ("the small dog", ("the",), (" ", "stop")),
        ("the small dog", (" small",), (" the", "stop")),
        ("the small dog", (" then", " small"), (" the", "stop")),
        ("the small dog", (" the small", "small"), ("", "stop")),
        ("the small dog", (" the small doge",), (" the small dog", "length")),
        ("the small dog", (" ",), ("", "stop")),
    ],
)
def test_stop_strings_at_the_first_space(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], said: tuple[str, str]
) -> None:
    found, _ = heard(tokenizer, [tokenizer.encode(text)], *stop)
    assert found == [said]


def test_what_begins_without_a_space_gets_none(tokenizer: Tokenizer) -> None:
    without = [token for token in tokenizer.encode("the dog") if not tokenizer.token_bytes(token).startswith(b" ")]
    assert heard(tokenizer, [[*without, EOS]], " the")[0] == [expected(tokenizer, [*without, EOS], ())]
    assert heard(tokenizer, [[EOS]], " the")[0] == [("", "stop")]


def test_samples_end_by_themselves(tokenizer: Tokenizer) -> None:
    """One stops at once, the other goes on; when both have stopped the engine is not asked for more."""
    the, dog = tokenizer.encode("the small dog sees"), tokenizer.encode("dog near the old house")
    found, engine = heard(tokenizer, [the, dog], " the")
    assert found == [("", "stop"), (" dog near", "stop")]
    assert engine.num_given < len(the) + len(dog)
    found, engine = heard(tokenizer, [the, the], " t")
    assert found == [("", "stop"), ("", "stop")]
    assert engine.num_given <= 2 * len(tokenizer.encode("the"))


@settings(deadline=None)
@given(
    ids=st.lists(st.one_of(st.just(EOS), st.integers(3, 369)), min_size=1, max_size=8),
    stops=st.lists(st.text(" thedog\u00e9", min_size=1, max_size=4), max_size=3),
)
def test_any_tokens_and_stop_strings(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> None:
    found, _ = heard(tokenizer, [ids], *stops)
    assert found == [expected(tokenizer, ids, stops)]
