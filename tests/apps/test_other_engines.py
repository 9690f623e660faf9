"""llama.cpp and vLLM behind the same seam, against our own engine on the same checkpoint; skipped where not installed.

No more of them need be installed than one wants to try: `pip install xllamacpp`, `pip install vllm`.
"""

import asyncio
import importlib.util
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.apps.small_model import CONTEXT, save_small_model

from groundup.base.errors import UserError
from groundup.base.generation import Completion, Delta, SamplingParams
from groundup.infer.engine import Engine
from groundup.model.checkpoint import Checkpoint, load_checkpoint
from groundup.serve import llama_cpp_backend, vllm_backend
from groundup.serve.backend import Cancelled, NotImplementedByEngine, Overloaded, Unavailable
from groundup.serve.llama_cpp_backend import open_llama_cpp
from groundup.serve.other_engine import OtherEngine, cached_path
from groundup.serve.vllm_backend import open_vllm

SLOTS, QUEUE = 2, 3
OPENERS: dict[str, tuple[str, Callable[..., OtherEngine]]] = {
    "llama.cpp": ("xllamacpp", open_llama_cpp),
    "vllm": ("vllm", open_vllm),
}
GREEDY = SamplingParams(max_new_tokens=12, temperature=0, stop_ids=(2,))


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One for all tests: a backend belongs to the loop that it was first used in."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


@pytest.fixture(scope="module", params=OPENERS)
def backend(
    request: pytest.FixtureRequest,
    folder: Path,
    loop: asyncio.AbstractEventLoop,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OtherEngine]:
    package, opener = OPENERS[request.param]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GROUNDUP_CACHE", str(tmp_path_factory.mktemp("cache")))
        backend = opener(folder, "small", slots=SLOTS, queue=QUEUE, max_tokens=CONTEXT)
    yield backend
    if backend.health() is None:
        loop.run_until_complete(backend.close(0))


@pytest.fixture(scope="module")
def prompts(checkpoint: Checkpoint) -> list[list[int]]:
    texts = ["the small dog", "a green river near", "WORDS it never saw, 42", "the king hears a song in the"]
    return [[1, *checkpoint.tokenizer.encode(text)] for text in texts]


async def ask(backend: OtherEngine, prompt: list[int], params: SamplingParams) -> list[Completion]:
    found: list[list[Delta]] = [[] for _ in range(params.num_samples)]
    async for delta in backend.start(prompt, params):
        found[delta.sample].append(delta)
    return [
        Completion(
            "".join(delta.text for delta in sample),
            [token for delta in sample for token in delta.token_ids],
            sample[-1].finish_reason or "error",
            [logp for delta in sample for logp in delta.logps],
            [top for delta in sample for top in delta.top_logps],
        )
        for sample in found
    ]


@pytest.fixture
def run(loop: asyncio.AbstractEventLoop) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return loop.run_until_complete


Run = Callable[[Coroutine[Any, Any, Any]], Any]


def test_greedy_as_our_engine(backend: OtherEngine, checkpoint: Checkpoint, prompts: list[list[int]], run: Run) -> None:
    """Ids, text, finish reasons and log-probabilities, alone and side by side."""
    params = replace(GREEDY, want_logps=True, top_logps=3)
    expected = [found[0] for found in Engine(checkpoint.model, checkpoint.tokenizer).generate(prompts, params)]
    assert len({tuple(completion.token_ids) for completion in expected}) == len(prompts)

    async def together() -> list[list[Completion]]:
        return await asyncio.gather(*(ask(backend, prompt, params) for prompt in prompts))

    alone = [run(ask(backend, prompt, params))[0] for prompt in prompts]
    for found in (alone, [completion for (completion,) in run(together())]):
        for mine, theirs in zip(expected, found):
            assert theirs.token_ids == mine.token_ids
            assert theirs.text == mine.text
            assert theirs.finish_reason == mine.finish_reason
            assert theirs.logps == pytest.approx(mine.logps, abs=2e-3)
            assert [[token for token, _ in top] for top in theirs.top_logps] == [
                [token for token, _ in top] for top in mine.top_logps
            ]


def test_characters_of_several_tokens(backend: OtherEngine, checkpoint: Checkpoint, run: Run) -> None:
    """No id and no piece of a character gets lost, and no stray U+FFFD comes."""
    ids = checkpoint.tokenizer.encode("\U0001f600")[-4:]
    assert len(ids) == 4
    found = []
    for place, token in enumerate(ids):
        prompt = [1, *ids[:place]]
        params = replace(GREEDY, max_new_tokens=1, logit_bias=((token, 100.0),))
        found += run(ask(backend, prompt, params))[0].token_ids
    assert found == ids
    # All four are equally likely to be forced in any order: the text is what our decoder makes of the ids.
    params = replace(GREEDY, temperature=1.0, max_new_tokens=12, seed=3, logit_bias=tuple((i, 100.0) for i in ids))
    (completion,) = run(ask(backend, [1], params))
    assert set(completion.token_ids) <= set(ids)
    assert len(completion.token_ids) == 12
    decoder = checkpoint.tokenizer.stream_decoder()
    assert completion.text == "".join(decoder.push(i) for i in completion.token_ids) + decoder.flush()


def test_stops(backend: OtherEngine, checkpoint: Checkpoint, prompts: list[list[int]], run: Run) -> None:
    whole = Engine(checkpoint.model, checkpoint.tokenizer).generate(prompts[:1], GREEDY)[0][0]
    stop = whole.text[3:6]
    (cut,) = run(ask(backend, prompts[0], replace(GREEDY, stop=("no such text", stop))))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    (by_id,) = run(ask(backend, prompts[0], replace(GREEDY, stop_ids=(whole.token_ids[2],))))
    first = whole.token_ids.index(whole.token_ids[2])
    assert by_id.token_ids == whole.token_ids[: first + 1]
    assert by_id.finish_reason == "stop"
    (eos,) = run(ask(backend, prompts[0], replace(GREEDY, logit_bias=((2, 100.0),))))
    assert (eos.token_ids, eos.text, eos.finish_reason) == ([2], "", "stop")
    (full,) = run(ask(backend, prompts[0], replace(GREEDY, max_new_tokens=10_000, logit_bias=((2, -100.0),))))
    assert len(full.token_ids) == CONTEXT - len(prompts[0])
    assert full.finish_reason == "length"


def test_samples_and_seeds(backend: OtherEngine, prompts: list[list[int]], run: Run) -> None:
    params = SamplingParams(max_new_tokens=8, temperature=1.0, num_samples=3, seed=2**62 + 5, stop_ids=(2,))
    first = run(ask(backend, prompts[0], params))
    assert run(ask(backend, prompts[0], params)) == first
    assert len({tuple(completion.token_ids) for completion in first}) > 1
    assert run(ask(backend, prompts[0], replace(params, seed=1))) != first
    narrow = replace(params, seed=None, top_p=0.0)
    assert len({tuple(c.token_ids) for c in run(ask(backend, prompts[0], narrow))}) == 1


def test_cancelled_and_overloaded(backend: OtherEngine, prompts: list[list[int]], run: Run) -> None:
    long = replace(GREEDY, max_new_tokens=100, logit_bias=((2, -100.0),))

    async def fill() -> None:
        requests = [backend.start(prompts[0], long) for _ in range(SLOTS + QUEUE)]
        with pytest.raises(Overloaded) as refused:
            backend.start(prompts[0], long)
        assert refused.value.retry_after_seconds
        assert backend.stats().active == SLOTS
        assert backend.stats().waiting == QUEUE
        await anext(requests[0])
        for request in requests:
            await request.aclose()  # type: ignore[attr-defined]
        assert backend.stats().active == backend.stats().waiting == backend.stats().cached_tokens == 0
        with pytest.raises(StopAsyncIteration):
            await anext(requests[0])

    for _ in range(3):
        run(fill())
    assert len(run(ask(backend, prompts[0], GREEDY))[0].token_ids) == 12
    with pytest.raises(UserError, match="at a time"):
        backend.start(prompts[0], replace(GREEDY, num_samples=SLOTS + QUEUE + 1))


def test_refuses_what_cannot_be(backend: OtherEngine, run: Run) -> None:
    async def start(prompt: list[int], params: SamplingParams = GREEDY) -> None:
        backend.start(prompt, params)

    for prompt in ([], [-1], [10**9], [1] * CONTEXT):
        with pytest.raises(UserError):
            run(start(prompt))
    with pytest.raises(UserError, match="temperature"):
        run(start([1], replace(GREEDY, temperature=float("nan"))))
    with pytest.raises(NotImplementedByEngine, match="schema"):
        run(start([1], replace(GREEDY, constraint=lambda: None)))  # type: ignore[arg-type, return-value]
    with pytest.raises(NotImplementedByEngine):
        run(backend.embed([[1]]))


def test_scores(backend: OtherEngine, checkpoint: Checkpoint, prompts: list[list[int]], run: Run) -> None:
    if backend.engine_name == "llama.cpp":
        with pytest.raises(NotImplementedByEngine):
            run(backend.score(prompts[0], 2))
        return
    expected = Engine(checkpoint.model, checkpoint.tokenizer).score(prompts[0], 2)
    found = run(backend.score(prompts[0], 2))
    assert found.logps == pytest.approx(expected.logps, abs=2e-3)
    assert [[token for token, _ in top] for top in found.top_logps] == [
        [token for token, _ in top] for top in expected.top_logps
    ]


def test_penalties(backend: OtherEngine, checkpoint: Checkpoint, prompts: list[list[int]], run: Run) -> None:
    params = replace(GREEDY, frequency_penalty=2.0, presence_penalty=1.0)
    if backend.engine_name == "llama.cpp":
        with pytest.raises(NotImplementedByEngine, match="penalty"):
            run(ask(backend, prompts[0], params))
        return
    expected = Engine(checkpoint.model, checkpoint.tokenizer).generate(prompts[:1], params)[0][0]
    assert run(ask(backend, prompts[0], params))[0].token_ids == expected.token_ids


def test_close(backend: OtherEngine, run: Run) -> None:
    """Running requests are ended with a word, new ones refused. The last test of a backend."""

    async def close() -> None:
        assert backend.health() is None
        params = replace(GREEDY, max_new_tokens=100, stop_ids=())
        requests = [backend.start([1], params) for _ in range(SLOTS + QUEUE)]
        await backend.close(0)
        for request in requests:
            with pytest.raises(Cancelled):
                while True:
                    await anext(request)
        assert backend.health() is not None
        with pytest.raises(Unavailable):
            backend.start([1], GREEDY)

    run(close())


def test_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for opener in (open_llama_cpp, open_vllm):
        with pytest.raises(UserError, match="pip install"):
            opener(folder, "small", slots=1, queue=1)


def test_weights_that_an_engine_has_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for opener in (llama_cpp_backend.open_llama_cpp, vllm_backend.open_vllm):
        with pytest.raises(UserError, match="int4"):
            opener(folder, "small", slots=1, queue=1, weights="int4")


def test_cached_path_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDUP_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    first = cached_path(source, "gguf", ".gguf")
    assert first == cached_path(source, "gguf", ".gguf")
    assert first.parent == tmp_path / "cache" / "gguf"
    (source / "config.json").write_text("{ }")
    assert cached_path(source, "gguf", ".gguf") != first
