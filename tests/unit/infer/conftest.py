"""A small random model, a byte tokenizer and small real tokenizers of both kinds for the engine's tests."""

import codecs

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.text.tokenizer import JsonTokenizer, Tokenizer, train_tokenizer

TEXTS = [
    'A list of names: {"name": "Zoë", "age": 31, "tags": ["a", "b"], "ok": true, "none": null}\n',
    "Once upon a time there was a little girl who liked to play with her 12 dogs & 345 cats. The end. " * 3,
    "  Indented lines,\ttabs and lines; naïve café, 日本, and -1.5e3 numbers 1990-05-17.",
]


class ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(bytes([token_id]) if token_id < 256 else b"")

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteTokenizer:
    """Ids 0..255 are bytes, the others add no text."""

    def stream_decoder(self) -> ByteDecoder:
        return ByteDecoder()

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < 256).decode(errors="replace")


@pytest.fixture(scope="session")
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def tiny_model() -> Transformer:
    """Weights large enough that its answers differ between prompts."""
    model = Transformer(ModelConfig(260, 32, 2, 4, 2, 8, 64, 64)).eval()
    model.init_weights(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


@pytest.fixture(scope="session", params=["sentencepiece", "byte-level"])
def real_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "sentencepiece":
        return train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("sentencepiece"), seed=0)
    raw = tokenizers.Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|start|>", "<|end|>", "<|turn|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return JsonTokenizer(raw.to_str(), bos="<|start|>", eos="<|end|>")
