"""What every engine that is not ours gets around it, with one that says what it is told to."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from groundup.base.errors import UserError
from groundup.base.generation import Delta, SamplingParams
from groundup.serve.backend import Cancelled, NotImplementedByEngine, Overloaded, RequestFailed, Unavailable
from groundup.serve.llama_cpp_backend import _body, _event, _tokens
from groundup.serve.other_engine import OtherEngine, Served, Tokens, truncation
from groundup.text.chat import chat_format_from_template
from groundup.text.tokenizer import Tokenizer, train_tokenizer

EOS = 2


class ToldEngine(OtherEngine):
    """Every response is `script`, a list of what comes at once; it then waits for ever if it `hangs`."""

    engine_name = "told"

    def __init__(self, tokenizer: Tokenizer, script: list[list[int]], *, hangs: bool = False) -> None:
        chat = chat_format_from_template(None, tokenizer)
        super().__init__(Served("told", tokenizer, chat, {}, tokenizer.vocab_size, 20), slots=2, queue=2)
        self.script, self.hangs = script, hangs
        self.seeds: list[int] = []
        self.num_open = 0
        self.is_down = False
        self.problem: str | None = None

    async def generate(
        self, prompt: list[int], params: SamplingParams, seed: int, limit: int
    ) -> AsyncGenerator[Tokens]:
        self.seeds.append(seed)
        self.num_open += 1
        try:
            for token_ids in self.script:
                await asyncio.sleep(0)
                yield Tokens(token_ids, [-float(i) for i in token_ids], [[(i, -1.0)] for i in token_ids])
            if self.hangs:
                await asyncio.Event().wait()
            if not self.script:
                raise RequestFailed("nothing to say")
        finally:
            self.num_open -= 1

    def engine_problem(self) -> str | None:
        return self.problem

    async def shut_down(self) -> None:
        self.is_down = True


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["the small dog sees a green river"] * 30, 380, tmp_path_factory.mktemp("tokenizer"), 0)


PARAMS = SamplingParams(max_new_tokens=10, stop_ids=(EOS,))


async def answer(engine: ToldEngine, params: SamplingParams = PARAMS) -> list[Delta]:
    return [delta async for delta in engine.start([1, 5], params)]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_text_ids_and_ends(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the dog \U0001f600 sees")
    assert len(ids) <= 10
    for script, reason in (([*([i] for i in ids), [EOS, 7]], "stop"), ([[*ids, EOS]], "stop"), ([ids], "stop")):
        deltas = asyncio.run(answer(ToldEngine(tokenizer, script)))
        assert text_of(deltas) == "the dog \U0001f600 sees"
        assert "\ufffd" not in text_of(deltas)
        assert [i for delta in deltas for i in delta.token_ids] == (ids if script == [ids] else [*ids, EOS])
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [reason]
        for delta in deltas:
            assert delta.logps == [-float(i) for i in delta.token_ids]
            assert delta.top_logps == [[(i, -1.0)] for i in delta.token_ids]
    deltas = asyncio.run(answer(ToldEngine(tokenizer, [ids]), replace(PARAMS, max_new_tokens=2)))
    assert ([i for delta in deltas for i in delta.token_ids], deltas[-1].finish_reason) == (ids[:2], "length")
    deltas = asyncio.run(answer(ToldEngine(tokenizer, [[5]] * 50), replace(PARAMS, max_new_tokens=10**9)))
    assert len(deltas) == 20 - 2


def test_stop_strings_over_borders_of_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the small dog sees")
    engine = ToldEngine(tokenizer, [[i] for i in ids], hangs=True)
    deltas = asyncio.run(answer(engine, replace(PARAMS, stop=("all do", "never"))))
    assert (text_of(deltas), deltas[-1].finish_reason) == ("the sm", "stop")
    assert engine.num_open == 0


def test_samples_have_seeds_of_their_own(tokenizer: Tokenizer) -> None:
    params = replace(PARAMS, num_samples=3, seed=7)
    engine = ToldEngine(tokenizer, [[5], [EOS]])
    assert {delta.sample for delta in asyncio.run(answer(engine, params))} == {0, 1, 2}
    asyncio.run(answer(engine, params))
    assert engine.seeds[:3] == engine.seeds[3:]
    assert len(set(engine.seeds)) == 3


def test_queue_cancellation_and_numbers(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        engine = ToldEngine(tokenizer, [[5]], hangs=True)
        requests = [engine.start([1, 5], replace(PARAMS, num_samples=n)) for n in (1, 3)]
        with pytest.raises(Overloaded):
            engine.start([1], PARAMS)
        with pytest.raises(UserError, match="at a time"):
            engine.start([1], replace(PARAMS, num_samples=5))
        assert (await anext(requests[0])).token_ids == [5]
        stats = engine.stats()
        assert (stats.active, stats.waiting, stats.slots, stats.generated_tokens) == (2, 2, 2, 4)
        for request in requests:
            await request.aclose()  # type: ignore[attr-defined]
            with pytest.raises(StopAsyncIteration):
                await anext(request)
        assert engine.num_open == engine.stats().active == engine.stats().waiting == engine.stats().cached_tokens == 0
        # Also one that nobody ever read, and that was closed before it began.
        await engine.start([1], PARAMS).aclose()  # type: ignore[attr-defined]
        assert engine.stats().active == 0

    asyncio.run(main())


def test_failures_reach_the_reader(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestFailed, match="nothing to say"):
        asyncio.run(answer(ToldEngine(tokenizer, []), replace(PARAMS, num_samples=2)))
    engine = ToldEngine(tokenizer, [[5]])
    engine.problem = "it is gone"
    assert engine.health() == "it is gone"
    with pytest.raises(Unavailable, match="it is gone"):
        asyncio.run(answer(engine))


def test_close_lets_end_then_ends(tokenizer: Tokenizer) -> None:
    async def main() -> None:
        quick, slow = ToldEngine(tokenizer, [[5], [EOS]]), ToldEngine(tokenizer, [[5]], hangs=True)
        first, second = quick.start([1], PARAMS), slow.start([1], PARAMS)
        await quick.close(60)
        await slow.close(0.05)
        assert [delta.token_ids async for delta in first] == [[5], [EOS]]
        assert (await anext(second)).token_ids == [5]
        with pytest.raises(Cancelled):
            await anext(second)
        for engine in (quick, slow):
            assert engine.is_down
            assert engine.health() is not None
            assert engine.num_open == 0
            with pytest.raises(Unavailable):
                engine.start([1], PARAMS)

    asyncio.run(main())


def test_refusals(tokenizer: Tokenizer) -> None:
    engine = ToldEngine(tokenizer, [[5]])

    async def start(prompt: list[int], params: SamplingParams = PARAMS) -> None:
        engine.start(prompt, params)

    for prompt in ([], [-1], [tokenizer.vocab_size], [1] * 20):
        with pytest.raises(UserError):
            asyncio.run(start(prompt))
    with pytest.raises(NotImplementedByEngine, match="schema"):
        asyncio.run(start([1], replace(PARAMS, constraint=lambda: None)))  # type: ignore[arg-type, return-value]
    for call in (engine.score([1], 1), engine.embed([[1]])):
        with pytest.raises(NotImplementedByEngine):
            asyncio.run(call)  # type: ignore[arg-type]


def test_truncation() -> None:
    assert truncation(SamplingParams(top_k=5, top_p=0.5)) == (5, 0.5)
    assert truncation(SamplingParams(top_k=5, top_p=0.0)) == (1, 1.0)


def test_llama_cpp_requests_and_events() -> None:
    params = SamplingParams(temperature=0.7, logit_bias=((5, -1.0),), want_logps=True)
    body = _body([1, 2], params, 2**62, 9)
    assert (body["prompt"], body["n_predict"], body["logit_bias"], body["n_probs"]) == ([1, 2], 9, [[5, -1.0]], 1)
    assert 0 <= body["seed"] < 2**32 - 1
    assert _body([1], SamplingParams(), 1, 1)["n_probs"] == 0
    with pytest.raises(NotImplementedByEngine):
        _body([1], SamplingParams(presence_penalty=1.0), 1, 1)
    assert _event("") is None
    assert _event(": ping") is None
    event = _event(
        'data: {"tokens": [7], "completion_probabilities": [{"id": 7, "logprob": -1.5, "top_logprobs": '
        '[{"id": 8, "logprob": -0.5}, {"id": 7, "logprob": -1.5}]}]}'
    )
    assert event is not None
    assert _tokens(event, 1) == Tokens([7], [-1.5], [[(8, -0.5)]])
    assert _tokens(event, 0) == Tokens([7], [-1.5], [])
    for line in ('data: {"error": {"message": "secret"}}', 'error: {"code": 500}'):
        with pytest.raises(RequestFailed):
            _event(line)
