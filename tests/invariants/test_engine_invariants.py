"""What must hold whatever else the engine is doing: answers, random numbers, log-probabilities, slots."""

import codecs
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from groundup.base.generation import SamplingParams
from groundup.data.batches import Batch
from groundup.infer.engine import Engine
from groundup.infer.quantize import Weights
from groundup.infer.scoring import score_tokens
from groundup.model.checkpoint import load_checkpoint
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.train.losses import token_logps

VOCAB = 300


class Bytes:
    """A tokenizer whose ids are bytes."""

    def stream_decoder(self) -> "Bytes":
        fresh = Bytes()
        fresh.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        return fresh

    def push(self, token_id: int) -> str:
        return self.utf8.decode(bytes([token_id % 256]))

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(ModelConfig(VOCAB, 32, 2, 4, 2, 8, 64, 128)).eval()
    model.init_weights(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def random_prompts(count: int, longest: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(VOCAB, size=generator.integers(1, longest + 1)).tolist() for _ in range(count)]


def streamed(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    return [token for delta in engine.stream(prompt, params) for token in delta.token_ids]


@pytest.mark.parametrize("weights", ["as is", "fp32", "int8"])
def test_an_answer_does_not_depend_on_its_neighbours(model: Transformer, weights: Weights) -> None:
    """Alone = among 15 others = in a used slot = behind a reused prefix; greedy and sampled."""
    prompts = random_prompts(16, 40, seed=1)
    greedy = SamplingParams(max_new_tokens=20, temperature=0)
    sampled = [SamplingParams(max_new_tokens=20, temperature=1.2, top_p=0.9, seed=n) for n in range(16)]
    for params in ([greedy] * 16, sampled):
        alone = [
            Engine(model, Bytes(), max_slots=1, weights=weights).generate([prompt], p)[0][0].token_ids
            for prompt, p in zip(prompts, params)
        ]
        assert len({tuple(answer) for answer in alone}) == 16
        together = Engine(model, Bytes(), max_slots=16, weights=weights)
        assert [samples[0].token_ids for samples in together.generate(prompts, params)] == alone
        few = Engine(model, Bytes(), max_slots=3, weights=weights)
        assert [samples[0].token_ids for samples in few.generate(prompts, params)] == alone
        # Streams keep what their slots held: every prompt a second time is all reused prefix but its last token.
        for index in (0, 5, 11):
            assert streamed(together, prompts[index], params[index]) == alone[index]
            assert streamed(together, prompts[index], params[index]) == alone[index]


def test_engine_scorer_and_trainer_agree_on_log_probabilities(model: Transformer) -> None:
    """Within 1e-5 in fp32, at temperature 1, so that the first PPO ratio is 1."""
    prompts = random_prompts(24, 60, seed=2)
    engine = Engine(model, Bytes(), max_slots=8)
    answers = engine.generate(prompts, SamplingParams(max_new_tokens=40, seed=0, want_logps=True))
    rows = [prompt + samples[0].token_ids for prompt, samples in zip(prompts, answers)]
    compared = 0
    for row, prompt, (answer,), score in zip(rows, prompts, answers, score_tokens(model, rows)):
        tokens = torch.tensor([row])
        targets = tokens[:, 1:]
        trained = token_logps(model, Batch(tokens[:, :-1], targets, torch.ones_like(targets, dtype=torch.bool)))[0]
        sampled = torch.tensor(answer.logps)
        torch.testing.assert_close(score, trained.detach(), atol=1e-5, rtol=0)
        torch.testing.assert_close(sampled, score[len(prompt) - 1 :], atol=1e-5, rtol=0)
        compared += len(sampled)
    assert compared == 24 * 40


def test_log_probabilities_carry_the_temperature(model: Transformer) -> None:
    params = SamplingParams(max_new_tokens=30, temperature=0.7, top_p=0.8, top_k=40, seed=3, want_logps=True)
    (answer,) = Engine(model, Bytes()).generate([[1, 2, 3]], params)[0]
    with torch.inference_mode():
        logits = model.logits(model(torch.tensor([[1, 2, 3, *answer.token_ids[:-1]]])))[0, 2:]
    expected = (logits.double() / 0.7).log_softmax(-1).gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(answer.logps).double(), expected, atol=1e-5, rtol=0)


def test_two_hundred_requests_with_disconnects_leave_no_slot_taken(model: Transformer) -> None:
    """30 % are cancelled: while waiting, at once, or in the middle; the others' answers are those they have alone."""
    generator = np.random.default_rng(4)
    prompts = random_prompts(200, 12, seed=5)
    params = SamplingParams(max_new_tokens=10, temperature=0)
    engine = Engine(model, Bytes(), max_slots=8)
    requests = {engine.submit(prompt, params): prompt for prompt in prompts}
    doomed = {int(r): int(generator.integers(60)) for r in generator.choice(list(requests), 60, replace=False)}
    answers: dict[int, list[int]] = {request: [] for request in requests}
    finished, step = set(), 0
    while engine.num_active or engine.num_waiting:
        for request in [request for request, when in doomed.items() if when == step and request not in finished]:
            engine.cancel(request)
            assert engine.num_active <= 8
        for delta in engine.step():
            assert delta.request_id not in doomed or doomed[delta.request_id] > step
            answers[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                finished.add(delta.request_id)
        step += 1
    assert finished >= set(requests) - set(doomed)
    assert len(finished) < 200
    alone = Engine(model, Bytes(), max_slots=1)
    for request in sorted(finished)[::7]:
        assert answers[request] == streamed(alone, requests[request], params)


def test_prompts_never_reach_other_requests(model: Transformer) -> None:
    """A secret in one prompt changes no other answer, whichever slots are used again."""
    engine = Engine(model, Bytes(), max_slots=4)
    params = SamplingParams(max_new_tokens=8, temperature=0)
    plain = random_prompts(30, 30, seed=6)
    expected = [samples[0].token_ids for samples in engine.generate(plain, params)]
    secrets = [[VOCAB - 1 - n] * 30 for n in range(30)]
    mixed = [prompt for pair in zip(secrets, plain) for prompt in pair]
    assert [samples[0].token_ids for samples in engine.generate(mixed, params)][1::2] == expected
    for secret, prompt, answer in zip(secrets, plain, expected):
        streamed(engine, secret, params)
        assert streamed(engine, prompt, params) == answer


def test_stream_and_batch_agree_on_text_with_stop_strings(model: Transformer) -> None:
    engine = Engine(model, Bytes(), max_slots=6)
    prompts = random_prompts(100, 10, seed=7)
    # Two-character strings out of likely output, so that many responses do stop.
    probe = "".join(samples[0].text for samples in engine.generate(prompts[:20], SamplingParams(32, seed=1)))
    stop = tuple({probe[i : i + 2] for i in range(0, 200, 10)})
    each = [SamplingParams(24, seed=n, stop=stop) for n in range(100)]
    whole = [samples[0] for samples in engine.generate(prompts, each)]
    assert 10 < sum(completion.finish_reason == "stop" for completion in whole) < 100
    for prompt, params, completion in zip(prompts, each, whole):
        deltas = list(engine.stream(prompt, params))
        assert "".join(delta.text for delta in deltas) == completion.text
        assert deltas[-1].finish_reason == completion.finish_reason
        assert not any(s in completion.text for s in stop)


def test_the_published_story_comes_out_of_a_full_batch(shared_data: Path) -> None:
    """stories260K, greedy: every row of a batch tells what a plain forward loop tells."""
    checkpoint = load_checkpoint(shared_data / "models" / "stories260K.bin")
    params = SamplingParams(max_new_tokens=60, temperature=0)
    prompt = [checkpoint.tokenizer.bos_id]
    starts = [prompt + checkpoint.tokenizer.encode(text) for text in ("", "Once upon", "Lily", "The dog", "Tom and")]
    engine = Engine(checkpoint.model, checkpoint.tokenizer)
    answers = [samples[0] for samples in engine.generate(starts, params)]
    for start, answer in zip(starts, answers):
        tokens = list(start)
        with torch.inference_mode():
            for _ in range(60):
                tokens.append(int(checkpoint.model.logits(checkpoint.model(torch.tensor([tokens])))[0, -1].argmax()))
        assert answer.token_ids == tokens[len(start) :]
    assert answers[0].text.startswith("Once upon a time, there was a little girl named Lily.")
    stopped = dataclasses.replace(params, stop=("little girl",))
    assert engine.generate(starts[:1], stopped)[0][0].text == "Once upon a time, there was a "
