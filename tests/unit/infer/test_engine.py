"""The engine: what requests give, limits, stops, streams, cancellation, reuse of prefixes."""

import codecs
import dataclasses
from typing import Any

import pytest
import torch

from groundup.base.errors import UserError
from groundup.base.generation import Delta, SamplingParams
from groundup.infer.engine import Engine
from groundup.infer.slots import MIN_PREFIX_TOKENS
from groundup.model.transformer import Transformer

GREEDY = SamplingParams(max_new_tokens=12, temperature=0)


@pytest.fixture
def engine(tiny_model: Transformer, byte_tokenizer: Any) -> Engine:
    return Engine(tiny_model, byte_tokenizer, max_slots=4)


@torch.inference_mode()
def naive_greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(model(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


def drain(engine: Engine) -> list[Delta]:
    deltas = []
    while engine.num_active or engine.num_waiting:
        deltas += engine.step()
    return deltas


def test_greedy_equals_the_full_forward(engine: Engine, tiny_model: Transformer) -> None:
    prompts = [[1], [5, 6, 7], list(range(40)), [200, 3]] * 3
    answers = engine.generate(prompts, GREEDY)
    assert len(answers) == 12
    for prompt, (answer,) in zip(prompts, answers):
        assert answer.token_ids == naive_greedy(tiny_model, prompt, 12)
        assert answer.finish_reason == "length"
    assert len({tuple(answer.token_ids) for (answer,) in answers}) == 4


def test_completions_keep_the_order_of_prompts_and_their_own_parameters(engine: Engine) -> None:
    each = [SamplingParams(max_new_tokens=n, seed=n, num_samples=1 + n % 2) for n in (1, 7, 3, 9, 2, 5)]
    answers = engine.generate([[n] for n in range(6)], each)
    assert [[len(c.token_ids) for c in samples] for samples in answers] == [[1, 1], [7, 7], [3, 3], [9, 9], [2], [5, 5]]
    assert engine.generate([], GREEDY) == []
    with pytest.raises(UserError, match="2 prompts but 1"):
        engine.generate([[1], [2]], [GREEDY])


def test_a_stop_id_ends_the_response_and_is_not_text(engine: Engine, tiny_model: Transformer) -> None:
    free = naive_greedy(tiny_model, [5, 6, 7], 12)
    stop_id = free[4]
    length = free.index(stop_id) + 1
    (answer,) = engine.generate([[5, 6, 7]], dataclasses.replace(GREEDY, stop_ids=(stop_id,), want_logps=True))[0]
    assert answer.token_ids == free[:length]
    assert len(answer.logps) == length
    assert answer.finish_reason == "stop"
    assert answer.text == engine.tokenizer.decode(free[: length - 1])  # type: ignore[attr-defined]


def test_a_stop_string_ends_the_response_and_is_not_leaked(engine: Engine, byte_tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=40, seed=1, temperature=2.0)
    (free,) = engine.generate([[9]], params)[0]
    stop = free.text[10:13]
    stopped = dataclasses.replace(params, stop=(stop, "never there"))
    (answer,) = engine.generate([[9]], stopped)[0]
    assert answer.finish_reason == "stop"
    assert answer.text == free.text[: free.text.index(stop)]
    assert free.token_ids[: len(answer.token_ids)] == answer.token_ids
    assert len(answer.token_ids) < 40
    assert "".join(delta.text for delta in engine.stream([9], stopped)) == answer.text


def test_new_tokens_are_cut_to_the_context(engine: Engine) -> None:
    (answer,) = engine.generate([[1] * 60], SamplingParams(max_new_tokens=100, temperature=0))[0]
    assert len(answer.token_ids) == 4
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "no tokens"), ([1] * 64, "64 tokens, but the context holds 64"), ([260], "0..259"), ([-1], "0..259")],
)
def test_bad_prompts_are_refused_and_leave_nothing_behind(engine: Engine, prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        engine.generate([[1], prompt], GREEDY)
    with pytest.raises(UserError, match=message):
        engine.submit(prompt, GREEDY)
    assert (engine.num_active, engine.num_waiting) == (0, 0)


def test_an_engine_needs_a_slot_and_a_known_form(tiny_model: Transformer, byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="max_slots = 0"):
        Engine(tiny_model, byte_tokenizer, max_slots=0)
    with pytest.raises(UserError, match="int3"):
        Engine(tiny_model, byte_tokenizer, weights="int3")  # type: ignore[arg-type]


def test_requests_join_while_others_decode(engine: Engine, tiny_model: Transformer) -> None:
    first = engine.submit([1, 2], dataclasses.replace(GREEDY, max_new_tokens=10))
    deltas = engine.step() + engine.step()
    second = engine.submit([3, 4, 5], dataclasses.replace(GREEDY, max_new_tokens=4))
    deltas += drain(engine)
    for request, prompt, count in ((first, [1, 2], 10), (second, [3, 4, 5], 4)):
        mine = [delta for delta in deltas if delta.request_id == request]
        assert [token for delta in mine for token in delta.token_ids] == naive_greedy(tiny_model, prompt, count)
        assert [delta.finish_reason for delta in mine] == [None] * (count - 1) + ["length"]


def test_more_requests_than_slots_wait_their_turn(engine: Engine) -> None:
    ids = [engine.submit([n], dataclasses.replace(GREEDY, max_new_tokens=2 + n % 3)) for n in range(11)]
    assert engine.num_waiting == 11
    engine.step()
    assert (engine.num_active, engine.num_waiting) == (4, 7)
    deltas = drain(engine)
    assert {delta.request_id for delta in deltas if delta.finish_reason} == set(ids)


def test_stream_gives_what_generate_gives(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=30, seed=4, num_samples=3, want_logps=True, temperature=1.3)
    whole = engine.generate([[7, 8]], params)[0]
    deltas = list(engine.stream([7, 8], params))
    for index, completion in enumerate(whole):
        mine = [delta for delta in deltas if delta.sample == index]
        assert "".join(delta.text for delta in mine) == completion.text
        assert [token for delta in mine for token in delta.token_ids] == completion.token_ids
        assert [logp for delta in mine for logp in delta.logps] == pytest.approx(completion.logps, abs=1e-5)
        assert mine[-1].finish_reason == completion.finish_reason


def test_deltas_never_hold_half_a_character(tiny_model: Transformer) -> None:
    text = "żółw 🐢 née 日本"
    pieces = list(text.encode())

    class Scripted:
        """Token n of the response is byte n of the text, whatever its id."""

        def __init__(self) -> None:
            self.utf8, self.index = codecs.getincrementaldecoder("utf-8")("replace"), 0

        def push(self, token_id: int) -> str:
            self.index += 1
            return self.utf8.decode(bytes([pieces[self.index - 1]]))

        def flush(self) -> str:
            return self.utf8.decode(b"", final=True)

    class Scripts:
        def stream_decoder(self) -> Scripted:
            return Scripted()

    engine = Engine(tiny_model, Scripts())
    deltas = list(engine.stream([1], SamplingParams(max_new_tokens=len(pieces), seed=0)))
    assert "".join(delta.text for delta in deltas) == text
    assert not any("\ufffd" in delta.text for delta in deltas)
    assert sum(delta.text == "" for delta in deltas) > 5


def test_closing_a_stream_or_cancelling_frees_the_slots(engine: Engine) -> None:
    stream = engine.stream([1, 2, 3], dataclasses.replace(GREEDY, num_samples=3))
    next(stream)
    assert engine.num_active == 3
    stream.close()
    assert (engine.num_active, engine.num_waiting) == (0, 0)
    waiting = [engine.submit([n], GREEDY) for n in range(6)]
    engine.step()
    for request in (waiting[0], waiting[2], waiting[5]):
        engine.cancel(request)
    engine.cancel(12345)
    finished = {delta.request_id for delta in drain(engine) if delta.finish_reason}
    assert finished == {waiting[1], waiting[3], waiting[4]}


def test_a_stream_and_a_batch_do_not_take_each_others_deltas(engine: Engine, tiny_model: Transformer) -> None:
    stream = engine.stream([1, 2], GREEDY)
    tokens = list(next(stream).token_ids)
    submitted = engine.submit([3], dataclasses.replace(GREEDY, max_new_tokens=3))
    (answer,) = engine.generate([[5, 6, 7]], GREEDY)[0]
    assert answer.token_ids == naive_greedy(tiny_model, [5, 6, 7], 12)
    tokens += [token for delta in stream for token in delta.token_ids]
    assert tokens == naive_greedy(tiny_model, [1, 2], 12)
    other = [token for delta in engine.step() for token in delta.token_ids]
    assert other == naive_greedy(tiny_model, [3], 3)
    assert submitted not in {delta.request_id for delta in engine.step()}


def test_samples_of_one_prompt_share_its_computation(engine: Engine) -> None:
    prompt = list(range(30))
    params = SamplingParams(max_new_tokens=5, seed=0, num_samples=4)
    engine.generate([prompt], params)
    assert engine.prefilled_tokens == 30
    engine.prefilled_tokens = 0
    # Those that find no slot at first copy the prompt from a slot that still has it: all but its last token.
    samples = engine.generate([prompt], dataclasses.replace(params, num_samples=10))[0]
    assert engine.prefilled_tokens <= 30 + 6
    assert len({tuple(sample.token_ids) for sample in samples}) == 10


def test_a_conversation_computes_only_its_new_turn(engine: Engine, tiny_model: Transformer) -> None:
    first = list(range(MIN_PREFIX_TOKENS + 4))
    answer = [token for delta in engine.stream(first, GREEDY) for token in delta.token_ids]
    second = [*first, *answer, 50, 51, 52]
    engine.prefilled_tokens = 0
    assert [token for delta in engine.stream(second, GREEDY) for token in delta.token_ids] == naive_greedy(
        tiny_model, second, 12
    )
    assert engine.prefilled_tokens == 4  # the last answer token was never fed


def test_refresh_takes_over_changed_weights(tiny_model: Transformer, byte_tokenizer: Any) -> None:
    changed = Transformer(tiny_model.config)
    changed.load_state_dict(tiny_model.state_dict())
    prompt = list(range(MIN_PREFIX_TOKENS + 1))
    for weights in ("as is", "fp32"):
        engine = Engine(changed, byte_tokenizer, weights=weights)  # type: ignore[arg-type]
        before = [token for delta in engine.stream(prompt, GREEDY) for token in delta.token_ids]
        with torch.no_grad():
            changed.blocks[0].ffn.w2.weight.mul_(-3)
        engine.refresh(changed)
        after = [token for delta in engine.stream(prompt, GREEDY) for token in delta.token_ids]
        assert after == naive_greedy(changed, prompt, 12) != before


def test_fresh_seeds_differ_and_fixed_ones_repeat(engine: Engine) -> None:
    free = SamplingParams(max_new_tokens=16, temperature=1.5)
    fixed = dataclasses.replace(free, seed=11)
    assert engine.generate([[1]], free) != engine.generate([[1]], free)
    assert engine.generate([[1]], fixed) == engine.generate([[1]], fixed)
    assert engine.generate([[1]], fixed) != engine.generate([[1]], dataclasses.replace(free, seed=12))


def test_the_generator_may_be_interrupted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0
    decode = engine._decode

    def interrupted() -> list[Delta]:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return decode()

    monkeypatch.setattr(engine, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1], [2]], GREEDY)
    assert (engine.num_active, engine.num_waiting) == (0, 0)
    assert len(engine.generate([[1]], GREEDY)[0][0].token_ids) == 12
