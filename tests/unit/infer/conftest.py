"""A small random model and a byte tokenizer for the engine's tests."""

import codecs

import pytest
import torch

from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer


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
