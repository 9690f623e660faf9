"""The engine under load: chunked prompts, fair admission, prefixes, cancellation, numbers; scores and embeddings."""

import dataclasses
from typing import Any

import pytest
import torch

from groundup.base.errors import UserError
from groundup.base.generation import Delta, SamplingParams
from groundup.infer.engine import Engine
from groundup.infer.scoring import score_tokens
from groundup.infer.slots import MIN_PREFIX_TOKENS
from groundup.model.cache import cache_bytes
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer

GREEDY = SamplingParams(max_new_tokens=12, temperature=0, want_logps=True)
VOCAB = 260


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(ModelConfig(VOCAB, 32, 2, 4, 2, 8, 64, 512)).eval()
    model.init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def drain(engine: Engine) -> list[Delta]:
    deltas = []
    while engine.num_active or engine.num_waiting:
        deltas += engine.step()
    return deltas


def tokens_of(deltas: list[Delta], request: int) -> list[int]:
    return [token for delta in deltas if delta.request_id == request for token in delta.token_ids]


def all_free(engine: Engine) -> bool:
    return engine.num_active == engine.num_waiting == 0 and not any(slot.is_taken for slot in engine.slots._slots)


# ---- chunks


@pytest.mark.parametrize("chunk", [2, 7, 64, 200])
def test_chunks_of_a_prompt_give_what_the_whole_prompt_gives(
    model: Transformer, byte_tokenizer: Any, chunk: int
) -> None:
    prompts = [prompt_of(length, seed=length) for length in (1, 2, 30, 129, 200, 333)]
    whole = Engine(model, byte_tokenizer).generate(prompts, GREEDY)
    engine = Engine(model, byte_tokenizer, max_slots=4, prefill_chunk=chunk)
    requests = [engine.submit(prompt, GREEDY) for prompt in prompts]
    deltas = drain(engine)
    for request, (expected,) in zip(requests, whole):
        assert tokens_of(deltas, request) == expected.token_ids
        logps = [logp for delta in deltas if delta.request_id == request for logp in delta.logps]
        assert logps == pytest.approx(expected.logps, abs=1e-5)


def test_a_long_prompt_stalls_nobody_for_longer_than_a_chunk(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer, max_slots=6, prefill_chunk=32)
    others = [engine.submit([n], dataclasses.replace(GREEDY, max_new_tokens=60)) for n in range(4)]
    engine.step()
    long = engine.submit(prompt_of(400), GREEDY)
    for _ in range(400 // 32):
        before = engine.prefilled_tokens
        deltas = engine.step()
        assert sorted(delta.request_id for delta in deltas) == others, "each active response gets its token"
        assert 0 < engine.prefilled_tokens - before <= 32
    assert tokens_of(engine.step(), long)


def test_short_prompts_do_not_wait_behind_long_ones(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer, max_slots=8, prefill_chunk=32)
    long = [engine.submit(prompt_of(400, seed), GREEDY) for seed in range(3)]
    engine.step()
    short = [engine.submit(prompt_of(5, seed), GREEDY) for seed in range(3)]
    assert {delta.request_id for delta in engine.step()} == set(short)
    before = engine.prefilled_tokens
    deltas = drain(engine)
    assert engine.prefilled_tokens - before > 1000
    assert {delta.request_id for delta in deltas if delta.finish_reason} == {*long, *short}


def test_the_oldest_prompt_gets_on_whatever_else_comes(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer, max_slots=8, prefill_chunk=32)
    long = engine.submit(prompt_of(160), GREEDY)
    for seed in range(10):
        for n in range(3):
            engine.submit(prompt_of(30, 100 + 3 * seed + n), dataclasses.replace(GREEDY, max_new_tokens=1))
        if tokens_of(engine.step(), long):
            break
    else:
        pytest.fail("16 tokens of 160 a step, and no first token after 10 steps")


def test_a_chunk_may_not_be_too_small(model: Transformer, byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="prefill_chunk = 1"):
        Engine(model, byte_tokenizer, prefill_chunk=1)


# ---- admission


def test_a_single_response_is_let_in_before_the_samples_that_came_first(
    model: Transformer, byte_tokenizer: Any
) -> None:
    engine = Engine(model, byte_tokenizer, max_slots=4)
    many = engine.submit([1, 2], SamplingParams(6, seed=0, num_samples=16))
    prompts = [engine.submit([3, n], dataclasses.replace(GREEDY, max_new_tokens=6), group="list") for n in range(16)]
    engine.step()
    single = engine.submit([5], dataclasses.replace(GREEDY, max_new_tokens=2))
    order = [delta.request_id for delta in drain(engine) if delta.finish_reason]
    assert order.index(single) <= 5
    assert sorted(order) == sorted([*[many] * 16, *prompts, single])
    half = order[: len(order) // 2]
    assert abs(half.count(many) - sum(request in prompts for request in half)) <= 2


def test_samples_let_in_later_share_the_prompt(model: Transformer, byte_tokenizer: Any) -> None:
    prompt = prompt_of(100)
    engine = Engine(model, byte_tokenizer, max_slots=4)
    engine.submit(prompt, SamplingParams(5, seed=0, num_samples=12))
    engine.submit(prompt, SamplingParams(5, seed=0))
    drain(engine)
    assert engine.prefilled_tokens <= 100 + 12
    assert engine.reused_tokens >= 12 * 99


# ---- prefixes


def test_prefixes_of_finished_requests_stay_under_load(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer, max_slots=8)
    system = prompt_of(60)
    first = engine.submit([*system, 1, 2, 3], GREEDY)
    answer = tokens_of(drain(engine), first)
    for seed in range(40):  # others come and go, two at a time, and each new one takes the oldest place
        engine.submit(prompt_of(20, 50 + seed), dataclasses.replace(GREEDY, max_new_tokens=1 + seed % 3))
        if seed % 5 == 0:
            drain(engine)
            before = engine.prefilled_tokens
            engine.submit([*system, 9, seed], dataclasses.replace(GREEDY, max_new_tokens=1))
            drain(engine)
            assert engine.prefilled_tokens - before <= 2
    again = engine.submit([*system, 1, 2, 3, *answer], GREEDY)
    assert tokens_of(drain(engine), again)
    assert engine.slots.cache.num_bytes <= cache_bytes(model.config, 8, 512)


def test_requests_that_arrive_together_share_what_the_first_computes(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer, max_slots=8, prefill_chunk=64)
    system = prompt_of(128)
    for n in range(8):
        engine.submit([*system, n, n], GREEDY)
    drain(engine)
    assert engine.prefilled_tokens < 128 * 8 / 2


# ---- cancellation


def test_cancelling_a_half_computed_prompt_frees_its_slot_at_once(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer, max_slots=3, prefill_chunk=32)
    doomed = engine.submit(prompt_of(300), dataclasses.replace(GREEDY, num_samples=4))
    engine.step()
    other = engine.submit([1, 2], GREEDY)
    engine.step()
    assert (engine.num_active, engine.num_waiting) == (3, 2)
    engine.cancel(doomed)
    assert (engine.num_active, engine.num_waiting) == (0, 1)
    assert not any(slot.is_taken for slot in engine.slots._slots)
    deltas = drain(engine)
    assert {delta.request_id for delta in deltas} == {other}
    before = engine.prefilled_tokens
    engine.submit(prompt_of(300), GREEDY)  # what had been computed is a prefix like any other
    drain(engine)
    assert engine.prefilled_tokens - before == 300 - 64


def test_one_of_two_who_wait_for_a_prompt_may_leave(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer, max_slots=3, prefill_chunk=32)
    prompt = prompt_of(100)
    first, second = (engine.submit(prompt, dataclasses.replace(GREEDY, num_samples=1)) for _ in range(2))
    engine.step()
    engine.cancel(first)
    assert engine.num_active == 1
    (expected,) = Engine(model, byte_tokenizer).generate([prompt], GREEDY)[0]
    assert tokens_of(drain(engine), second) == expected.token_ids
    assert all_free(engine)


def test_nothing_of_an_interrupted_step_is_used_again(
    model: Transformer, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, byte_tokenizer, prefill_chunk=32)
    prompt = prompt_of(100)
    (expected,) = engine.generate([prompt], GREEDY)[0]
    other = engine.submit([4], GREEDY)
    stream = engine.stream(prompt, GREEDY)
    next(stream)

    def torn(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_accept", torn)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert all_free(engine)
    assert engine.slots.num_tokens == 0
    assert [(delta.request_id, delta.finish_reason) for delta in engine.step()] == [(other, "cancelled")]
    assert engine.generate([prompt], GREEDY)[0][0].token_ids == expected.token_ids


# ---- numbers


def test_stats(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer, max_slots=2, prefill_chunk=32)
    for n in range(3):
        engine.submit([*prompt_of(40), n], dataclasses.replace(GREEDY, max_new_tokens=2))
    stats = engine.stats()
    assert (stats.active, stats.waiting, stats.slots, stats.cached_tokens) == (0, 3, 2, 0)
    engine.step()
    stats = engine.stats()
    assert (stats.active, stats.waiting, stats.prefilled_tokens, stats.generated_tokens) == (2, 1, 32, 0)
    assert stats.cached_tokens == 32
    drain(engine)
    stats = engine.stats()
    assert (stats.active, stats.waiting, stats.generated_tokens) == (0, 0, 6)
    assert stats.prefilled_tokens + stats.reused_tokens == 3 * 41
    assert stats.reused_tokens >= 40


# ---- adjusted logits


@torch.inference_mode()
def next_logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor([tokens])))[0, -1].double()


def test_bias_and_penalties_equal_hand_numbers(model: Transformer, byte_tokenizer: Any) -> None:
    prompt, bias = [5, 6, 7], ((17, 2.5), (40, -100.0), (17, 0.5))
    params = SamplingParams(
        30, 0.9, seed=1, want_logps=True, logit_bias=bias, frequency_penalty=0.7, presence_penalty=1.1, top_logps=4
    )
    (answer,) = Engine(model, byte_tokenizer).generate([prompt], params)[0]
    assert 40 not in answer.token_ids
    assert len(set(answer.token_ids)) < len(answer.token_ids), "a token must come twice for the test to say something"
    for index, token in enumerate(answer.token_ids):
        before = answer.token_ids[:index]
        logits = next_logits(model, prompt + before).clone()
        logits[17] += 3.0
        logits[40] -= 100.0
        for seen in set(before):
            logits[seen] -= 0.7 * before.count(seen) + 1.1
        logps = (logits / 0.9).log_softmax(-1)
        assert answer.logps[index] == pytest.approx(logps[token].item(), abs=2e-5)
        values, ids = logps.topk(4)
        assert [token for token, _ in answer.top_logps[index]] == ids.tolist()
        assert [logp for _, logp in answer.top_logps[index]] == pytest.approx(values.tolist(), abs=2e-5)


def test_adjustments_touch_no_other_row_and_no_other_sample(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer)
    plain = dataclasses.replace(GREEDY, max_new_tokens=20)
    (alone,) = engine.generate([[7]], plain)[0]
    adjusted = dataclasses.replace(plain, presence_penalty=5.0, num_samples=3)
    (beside,), repeated = engine.generate([[7], [7]], [plain, adjusted])
    assert beside.token_ids == alone.token_ids
    assert beside.top_logps == []
    for sample in repeated:
        assert sample.token_ids == repeated[0].token_ids
        assert sample.token_ids != alone.token_ids
        assert len(set(sample.token_ids)) > len(set(alone.token_ids))


def test_top_logps_come_in_streams_and_batches_alike(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer)
    params = dataclasses.replace(GREEDY, top_logps=3)
    (whole,) = engine.generate([[3, 4]], params)[0]
    deltas = list(engine.stream([3, 4], params))
    assert [top for delta in deltas for top in delta.top_logps] == whole.top_logps
    for token, logp, top in zip(whole.token_ids, whole.logps, whole.top_logps):
        assert len(top) == 3
        assert top[0] == (token, pytest.approx(logp, abs=1e-6))
        assert top[0][1] >= top[1][1] >= top[2][1]


def test_bad_biases_are_refused(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer)
    with pytest.raises(UserError, match=r"logit_bias names token 260"):
        engine.submit([1], dataclasses.replace(GREEDY, logit_bias=((260, 1.0),)))
    assert engine.num_waiting == 0


# ---- scores and embeddings


@pytest.mark.parametrize("chunk", [2, 13, 512])
def test_scores_of_a_prompt_equal_the_full_forward(model: Transformer, byte_tokenizer: Any, chunk: int) -> None:
    prompt = prompt_of(50)
    engine = Engine(model, byte_tokenizer, prefill_chunk=chunk)
    scores = engine.score(prompt, top=3)
    (expected,) = score_tokens(model, [prompt])
    assert scores.logps == pytest.approx(expected.tolist(), abs=1e-5)
    with torch.inference_mode():
        logps = model.logits(model(torch.tensor([prompt])))[0, :-1].log_softmax(-1)
    values, ids = logps.topk(3)
    assert [[token for token, _ in top] for top in scores.top_logps] == ids.tolist()
    flat = [logp for top in scores.top_logps for _, logp in top]
    assert flat == pytest.approx(values.flatten().tolist(), abs=1e-5)
    assert engine.score([4]).logps == []
    assert engine.score(prompt).top_logps == [[]] * 49
    assert engine.stats().prefilled_tokens == 0


def test_scoring_goes_in_chunks_between_steps(model: Transformer, byte_tokenizer: Any) -> None:
    engine = Engine(model, byte_tokenizer, prefill_chunk=10)
    request = engine.submit([1, 2, 3], GREEDY)
    parts, deltas = [], []
    for part in engine.score_in_chunks(prompt_of(45), 2):
        parts.append(part)
        deltas += engine.step()
    assert [part is None for part in parts] == [True] * 5 + [False]
    assert parts[-1] == engine.score(prompt_of(45), 2)
    expected = Engine(model, byte_tokenizer).generate([[1, 2, 3]], GREEDY)[0][0].token_ids
    assert tokens_of([*deltas, *drain(engine)], request) == expected


@pytest.mark.parametrize("chunk", [2, 16, 512])
def test_embeddings_are_mean_hidden_states_of_length_one(model: Transformer, byte_tokenizer: Any, chunk: int) -> None:
    rows = [prompt_of(length, seed=length) for length in (3, 1, 40, 12, 7)]
    vectors = Engine(model, byte_tokenizer, prefill_chunk=chunk).embed(rows)
    assert vectors.shape == (5, 32)
    for row, vector in zip(rows, vectors):
        with torch.inference_mode():
            mean = model(torch.tensor([row]))[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompt", [[], [260], [1] * 512])
def test_prompts_to_score_or_embed_are_checked(model: Transformer, byte_tokenizer: Any, prompt: list[int]) -> None:
    engine = Engine(model, byte_tokenizer)
    with pytest.raises(UserError):
        engine.score(prompt)
    with pytest.raises(UserError):
        engine.embed([[1], prompt])


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_prepared_weights_serve_scores_chunks_and_embeddings(
    model: Transformer, byte_tokenizer: Any, weights: Any
) -> None:
    prompt = prompt_of(MIN_PREFIX_TOKENS * 4)
    tolerance = 1e-4 if weights == "fp32" else 1.0
    engine = Engine(model, byte_tokenizer, weights=weights, prefill_chunk=16)
    (expected,) = score_tokens(model, [prompt])
    assert engine.score(prompt).logps == pytest.approx(expected.tolist(), abs=tolerance)
    assert engine.embed([prompt])[0].norm().item() == pytest.approx(1.0, abs=1e-4)
    request = engine.submit(prompt, GREEDY)
    whole = Engine(model, byte_tokenizer, weights=weights).generate([prompt], GREEDY)[0][0]
    first = next(delta for delta in drain(engine) if delta.request_id == request)
    assert first.logps[0] == pytest.approx(whole.logps[0], abs=tolerance)
