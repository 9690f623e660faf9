"""Small tokenizers of both kinds."""

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from groundup.text.tokenizer import JsonTokenizer, Tokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "Once upon a time there was a little girl who liked to play [with] her 12 dogs & 345 cats.\n\nThe end.",
    "  Indented lines,\ttabs and\r\nline ends; naïve café, déjà vu, and    runs of spaces.",
    "It's what we'll do: def f(x): return {'a': x ** 2 // 3}  # <b>bold</b> e-mail@example.org",
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 5,
    "----- ===== ..... -=-=-=-=- aaaaaaa hahahahaha",
]


@pytest.fixture(scope="session")
def small_corpus() -> list[str]:
    return TEXTS


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_tokenizer(TEXTS, 480, folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def chatml() -> Tokenizer:
    """Byte-level BPE with SmolLM2's pre-tokenizer and control tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return JsonTokenizer(tokenizer.to_str(), bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>")


@pytest.fixture(scope="session", params=["sentencepiece", "chatml"])
def tokenizer(request: pytest.FixtureRequest, sentencepiece_folder: Path, chatml: Tokenizer) -> Tokenizer:
    return chatml if request.param == "chatml" else load_tokenizer(sentencepiece_folder)
