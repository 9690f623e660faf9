"""Models with random weights that benchmarks run when only the shape matters."""

from pathlib import Path
from typing import Any

SHAPES = {  # ModelConfig's fields from vocab_size to max_positions
    "S": (32_000, 288, 6, 6, 6, 48, 768, 2048),
    "M": (4096, 512, 8, 8, 4, 64, 1376, 2048),
    "L": (32_000, 1024, 16, 16, 8, 64, 2816, 2048),
}


def random_model(name: str) -> Any:
    """The `Transformer` that all peers run."""
    from groundup.model.config import ModelConfig
    from groundup.model.transformer import Transformer

    model = Transformer(ModelConfig(*SHAPES[name], tie_embeddings=name == "S"))
    model.init_weights(0)
    return model


def num_weights(name: str) -> int:
    """Weights that a decoding step multiplies with."""
    vocab_size, dim, layers, heads, kv_heads, head_dim, ffn_dim, _ = SHAPES[name]
    layer_weights = dim * head_dim * 2 * (heads + kv_heads) + 3 * dim * ffn_dim
    return layers * layer_weights + vocab_size * dim


def made_up_vocabulary(size: int) -> dict[str, Any]:
    """The `tokenizer.*` fields of a GGUF file: control tokens, bytes, and a word for each other id."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [f"▁w{index}" for index in range(size - len(pieces))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*pieces, *words],
        "tokenizer.ggml.scores": [-float(index) for index in range(size)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(words)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write_gguf(name: str, path: Path, quantisation: Any) -> None:
    """The model as a GGUF file with its made-up vocabulary."""
    from groundup.model.weights.gguf import save_gguf

    model = random_model(name)
    vocabulary = made_up_vocabulary(model.config.vocab_size)
    save_gguf(path, model.config, model.state_dict(), vocabulary, name=name, quantisation=quantisation)


def write_files(name: str, folder: Path) -> None:
    """The model as decoding peers read it: a Hugging Face folder in bf16, and a GGUF file in q8_0."""
    import torch

    from groundup.model.weights.hf import save_hf

    model = random_model(name)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    save_hf(folder / "hf", model.config, model.state_dict(), dtype=torch.bfloat16, token_ids=ids, generation={})
    write_gguf(name, folder / "model.gguf", "q8_0")
