"""llama2.c files: both versions of a real model, and our own writing."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from groundup.base.errors import CorruptFile, UserError
from groundup.model.config import PRESETS, ModelConfig
from groundup.model.transformer import Transformer
from groundup.model.weights import layout, llama2c

CONFIG = ModelConfig(96, 32, 3, 4, 2, 8, 48, 64)


def state_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    model = Transformer(config)
    model.init_weights(3)
    return model.state_dict()


def read_state(path: Path) -> dict[str, torch.Tensor]:
    opened = llama2c.open_llama2c(path)
    return layout.fuse(opened.config, opened.parts, torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_a_round_trip_changes_no_bit(tmp_path: Path, tied: bool) -> None:
    config = ModelConfig(96, 32, 3, 4, 2, 8, 48, 64, tie_embeddings=tied)
    state = state_of(config)
    llama2c.save_llama2c(tmp_path / "m.bin", config, state)
    assert llama2c.open_llama2c(tmp_path / "m.bin").config == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_state(tmp_path / "m.bin").items())


@pytest.mark.parametrize("tied", [False, True])
def test_version_0_is_read_by_its_published_order(tmp_path: Path, tied: bool) -> None:
    config = ModelConfig(96, 32, 3, 4, 2, 8, 48, 64, tie_embeddings=tied)
    state = state_of(config)
    parts = dict(layout.unfuse_interleaved(config, state))
    order = ["attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo", "ffn_norm"]
    order += ["ffn.w1", "ffn.w2", "ffn.w3"]
    tensors = [parts["embed.weight"]]
    tensors += [parts[f"blocks.{layer}.{name}.weight"] for name in order for layer in range(3)]
    tensors += [parts["norm.weight"], torch.full((64, 4), 7.0), torch.full((64, 4), 8.0)]
    tensors += [] if tied else [parts["head.weight"]]
    header = struct.pack("<7i", 32, 48, 3, 4, 2, 96 if tied else -96, 64)
    (tmp_path / "m.bin").write_bytes(header + b"".join(t.contiguous().numpy().tobytes() for t in tensors))
    assert llama2c.open_llama2c(tmp_path / "m.bin").config == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_state(tmp_path / "m.bin").items())


def test_both_versions_of_the_real_model_agree(shared_data: Path, tmp_path: Path) -> None:
    models = shared_data / "models"
    opened = llama2c.open_llama2c(models / "stories260K.bin")
    assert opened.config == PRESETS["260k"]
    first, second = read_state(models / "stories260K.bin"), read_state(models / "stories260K_v1.bin")
    assert all(torch.equal(first[name], second[name]) for name in first)
    llama2c.save_llama2c(tmp_path / "m.bin", opened.config, first)
    assert (tmp_path / "m.bin").read_bytes() == (models / "stories260K_v1.bin").read_bytes()


@pytest.mark.parametrize("change", [-4, 4], ids=["truncated", "too long"])
def test_a_wrong_size_is_named(tmp_path: Path, change: int) -> None:
    path = tmp_path / "m.bin"
    llama2c.save_llama2c(path, CONFIG, state_of(CONFIG))
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    with pytest.raises(
        CorruptFile, match=rf"m\.bin: {len(data) + change} bytes, but its header needs {len(data)}|shorter than"
    ):
        llama2c.open_llama2c(path)


def test_headers_of_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    rng = np.random.default_rng(0)
    for _ in range(300):
        path.write_bytes(rng.bytes(int(rng.integers(0, 400))))
        with pytest.raises(UserError, match=r"m\.bin"):
            llama2c.open_llama2c(path)
    for number in range(300):
        fields = rng.integers(-5, 2**31 - 1 if number % 2 else 40, 7)
        path.write_bytes(struct.pack("<7i", *fields.tolist()) + bytes(50))
        with pytest.raises(UserError, match=r"m\.bin"):
            llama2c.open_llama2c(path)
    path.write_bytes(struct.pack("<Ii", 0x616B3432, 2) + bytes(300))
    with pytest.raises(UserError, match="version 2"):
        llama2c.open_llama2c(path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"norm_eps": 1e-6}, "norm_eps"), ({"rope_theta": 5e5}, "rope_theta"), ({"head_dim": 4}, "head_dim")],
)
def test_what_run_c_cannot_run_is_refused(tmp_path: Path, changes: dict, word: str) -> None:
    config = ModelConfig(**{**CONFIG.__dict__, **changes})
    with pytest.raises(UserError, match=word):
        llama2c.save_llama2c(tmp_path / "m.bin", config, state_of(config))
    assert not list(tmp_path.iterdir())
