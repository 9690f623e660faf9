import math

import numpy as np
import pytest
import torch

from groundup.base.errors import UserError
from groundup.data.batches import TokenBatches
from groundup.data.shards import TokenShards, write_index, write_split
from groundup.evals.perplexity import Surprise, bits_per_byte, held_out_metrics, perplexity
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.text.tokenizer import load_tokenizer

CONTEXT = 16


@pytest.fixture(scope="module")
def model():
    model = Transformer(
        ModelConfig(vocab_size=512, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=64)
    )
    model.init_weights(0)
    return model.double()


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return load_tokenizer(shared_data / "models" / "tok512.bin")


def slow_nats(model, ids, first_seen):
    """-log p of ids[i] given ids[first_seen(i):i], one forward pass each, float64."""
    total = 0.0
    with torch.no_grad():
        for i in range(1, len(ids)):
            hidden = model(torch.tensor([ids[first_seen(i) : i]]))[0, -1]
            total -= torch.log_softmax(hidden @ model.head_weight.T, -1)[ids[i]].item()
    return total


@pytest.mark.parametrize(
    ("num_ids", "stride"), [(2, 4), (10, 4), (17, 4), (18, 4), (50, 4), (50, 16), (49, 1), (50, 7)]
)
def test_strided_windows_equal_one_pass_a_token(model, num_ids, stride):
    ids = np.random.default_rng(0).integers(3, 512, num_ids).tolist()

    def first_seen(i):
        """The start of the first window that reaches target i: windows see ids start..start+context-1."""
        window = 0
        while window * stride + CONTEXT < i:
            window += 1
        return window * stride

    surprise = perplexity(model, ids, CONTEXT, stride, micro_rows=3)
    assert surprise.tokens == num_ids - 1
    assert surprise.nats == pytest.approx(slow_nats(model, ids, first_seen), abs=1e-4)


def test_an_untrained_model_is_as_surprised_as_by_chance(model):
    ids = np.random.default_rng(0).integers(3, 512, 400).tolist()
    assert perplexity(model, ids, CONTEXT).nats_per_token == pytest.approx(math.log(512), rel=0.05)


def test_units():
    surprise = Surprise(nats=math.log(2) * 80, tokens=40)
    assert surprise.bits_per_byte(160) == pytest.approx(0.5)
    assert surprise.perplexity == pytest.approx(4.0)


def test_bits_per_byte_of_a_text_counts_its_bytes(model, tokenizer):
    text = "Ünïcode über alles"
    nats = slow_nats(model, [1, *tokenizer.encode(text)], lambda i: 0)
    assert bits_per_byte(model, tokenizer, text, 64) == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


def test_wrong_strides_and_short_texts_are_named(model):
    with pytest.raises(UserError, match="stride 17 must lie between 1 and the context of 16"):
        perplexity(model, [1, 2, 3], CONTEXT, 17)
    with pytest.raises(UserError, match="2 tokens or more, found 1"):
        perplexity(model, [1], CONTEXT)


def test_held_out_windows_equal_the_slow_sum(model, tokenizer, tmp_path):
    texts = ["Once upon a time there was a cat.", "The end", "Äpfel fell from the tree."]
    infos = write_split(texts, tokenizer, tmp_path / "held_out", shard_tokens=10**6)
    write_index(tmp_path, tokenizer, {"held_out": infos})
    batches = TokenBatches(TokenShards(tmp_path, "held_out", tokenizer), 4, CONTEXT, seed=0)
    ids = batches.shards.read(0, 10**6).tolist()
    nats = slow_nats(model, ids, lambda i: (i - 1) // CONTEXT * CONTEXT)
    for micro_rows in (1, 3, 100):
        metrics = held_out_metrics(model, batches, micro_rows)
        assert metrics["held_out_loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-6)
        text_bytes = sum(len(text.encode()) for text in texts)
        assert metrics["held_out_bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)
    some = held_out_metrics(model, batches, 2, max_windows=2)
    assert set(some) == {"held_out_loss", "held_out_bits_per_byte"}
    assert some["held_out_loss"] != pytest.approx(nats / (len(ids) - 1), rel=1e-9)
