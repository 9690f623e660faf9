"""A chat model of random weights, small enough that every test may run it."""

from pathlib import Path

import torch

from groundup.model.checkpoint import Checkpoint, save_checkpoint
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.text.chat import chat_format_from_template
from groundup.text.tokenizer import train_tokenizer

CONTEXT = 128
WORDS = "the small dog sees a green river near the old house and the quiet king hears a song in the forest"


def save_small_model(folder: Path, seed: int = 0) -> Path:
    """A model folder: 2 layers, 64 wide, a SentencePiece vocabulary with bytes, Llama 2's chat format."""
    tokenizer = train_tokenizer([WORDS] * 20, 400, folder.with_name(f"{folder.name}-tokenizer"), 0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, dim=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, ffn_dim=64,
        max_positions=CONTEXT,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights(seed)
    with torch.no_grad():
        # Larger than at the start of a training: the likely tokens stand out, as they do in a trained model.
        for parameter in model.parameters():
            parameter *= 4 if parameter.dim() > 1 else 1
    chat = chat_format_from_template(None, tokenizer)
    folder.mkdir(parents=True)
    save_checkpoint(folder, Checkpoint(model, config, tokenizer, chat, {}))
    return folder
