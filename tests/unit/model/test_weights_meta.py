"""Meta's folders: shards merge and split by the published axes, and nothing in them runs."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from groundup.base.errors import CorruptFile, UserError
from groundup.model.config import PRESETS, ModelConfig, ffn_width
from groundup.model.transformer import Transformer
from groundup.model.weights import layout, meta

CONFIG = ModelConfig(96, 32, 2, 8, 4, 4, ffn_width(32, 16))
PARAMS = {
    "dim": 32,
    "multiple_of": 16,
    "n_heads": 8,
    "n_kv_heads": 4,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
# Name -> axis that ranks split, written down independently of the code under test (facts, section 1).
AXES = {
    "tok_embeddings.weight": 1, "output.weight": 0, "norm.weight": None, "attention.wq.weight": 0,
    "attention.wk.weight": 0, "attention.wv.weight": 0, "attention.wo.weight": 1, "feed_forward.w1.weight": 0,
    "feed_forward.w2.weight": 1, "feed_forward.w3.weight": 0, "attention_norm.weight": None, "ffn_norm.weight": None,
}  # fmt: skip


def axis_of(name: str) -> int | None:
    return AXES[name.split(".", 2)[2] if name.startswith("layers.") else name]


def meta_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A whole model under Meta's names."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"tok_embeddings.weight": (96, 32), "norm.weight": (32,), "output.weight": (96, 32)}
    F = CONFIG.ffn_dim
    for layer in range(2):
        block = {
            "attention.wq.weight": (32, 32), "attention.wk.weight": (16, 32), "attention.wv.weight": (16, 32),
            "attention.wo.weight": (32, 32), "feed_forward.w1.weight": (F, 32), "feed_forward.w2.weight": (32, F),
            "feed_forward.w3.weight": (F, 32), "attention_norm.weight": (32,), "ffn_norm.weight": (32,),
        }  # fmt: skip
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def make_folder(folder: Path, shards: int, dtype: torch.dtype = torch.float16) -> Path:
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(PARAMS))
    for rank in range(shards):
        pieces = {
            name: tensor.clone() if axis_of(name) is None else tensor.chunk(shards, axis_of(name))[rank].clone()
            for name, tensor in meta_tensors(dtype).items()
        }
        torch.save({**pieces, "rope.freqs": torch.ones(2)}, folder / f"consolidated.{rank:02d}.pth")
    return folder


def read_state(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    opened = meta.open_meta(folder, 96)
    return opened.config, layout.fuse(opened.config, opened.parts, opened.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_round_trip_changes_no_bit(tmp_path: Path, shards: int, dtype: torch.dtype) -> None:
    source = make_folder(tmp_path / "a", shards, dtype)
    config, state = read_state(source)
    assert config == CONFIG
    assert state["embed.weight"].dtype == dtype
    meta.save_meta(tmp_path / "b", config, state, dtype=dtype, shards=shards)
    for rank in range(shards):
        name = f"consolidated.{rank:02d}.pth"
        before, after = (torch.load(tmp_path / side / name, weights_only=True) for side in "ab")
        del before["rope.freqs"]
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key
            assert after[key].untyped_storage().nbytes() == after[key].nbytes


def test_any_number_of_shards_is_the_same_model(tmp_path: Path) -> None:
    _, whole = read_state(make_folder(tmp_path / "1", 1))
    for shards in (2, 4):
        _, merged = read_state(make_folder(tmp_path / str(shards), shards))
        assert all(torch.equal(merged[name], tensor) for name, tensor in whole.items())
    permuted = layout.to_rotate_half(meta_tensors(torch.float16)["layers.1.attention.wk.weight"], 4)
    assert torch.equal(whole["blocks.1.attention.wqkv.weight"][32:48], permuted)


@pytest.mark.parametrize("name", ["7b", "13b", "34b", "70b", "110m", "260k", "1b"])
def test_params_describe_the_preset(tmp_path: Path, name: str) -> None:
    preset = PRESETS[name]
    path = tmp_path / "params.json"
    path.write_text(json.dumps(meta._params(preset)))
    assert meta._read_params(path, 0).ffn_dim == preset.ffn_dim
    released = {"7b": (256, None), "13b": (256, None), "34b": (256, None), "70b": (4096, 1.3)}
    params = json.loads(path.read_text())
    if name in released:
        assert (params["multiple_of"], params.get("ffn_dim_multiplier")) == released[name]


def test_every_ffn_width_can_be_described() -> None:
    for ffn_dim in range(1, 400):
        assert ffn_width(96, *meta._ffn_rule(96, ffn_dim)) == ffn_dim


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe": {}}, "key 'moe'"),
        ({"use_scaled_rope": True}, "use_scaled_rope"),
        ({"dim": None}, "dim = None"),
        ({"multiple_of": 0}, "multiple_of = 0"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier = '1.3'"),
        ({"norm_eps": "tiny"}, "norm_eps = 'tiny'"),
        ({"n_kv_heads": 3}, "n_heads = 8"),
        ({"multiple_of": 64}, r"w1\.weight has shape \[96, 32\].*\[128, 32\]"),
        ({"vocab_size": 95}, r"tok_embeddings\.weight has shape \[96, 32\]"),
    ],
    ids=str,
)
def test_params_that_do_not_fit_are_named(tmp_path: Path, changes: dict, words: str) -> None:
    folder = make_folder(tmp_path / "a", 2)
    (folder / "params.json").write_text(json.dumps({**PARAMS, **changes}))
    with pytest.raises(UserError, match=words):
        meta.open_meta(folder, 96)


def test_shards_that_do_not_belong_together_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", 2)
    second = folder / "consolidated.01.pth"
    tensors = torch.load(second, weights_only=True)
    torch.save({**tensors, "output.weight": torch.zeros(47, 32)}, second)
    with pytest.raises(UserError, match=r"consolidated\.01\.pth: tensor output\.weight has shape \[47, 32\]"):
        meta.open_meta(folder, 96)
    torch.save({name: tensor for name, tensor in tensors.items() if name != "output.weight"}, second)
    with pytest.raises(UserError, match=r"consolidated\.01\.pth.*output\.weight"):
        meta.open_meta(folder, 96)
    second.rename(folder / "consolidated.02.pth")
    with pytest.raises(UserError, match=r"consolidated\.02\.pth"):
        meta.open_meta(folder, 96)


def test_the_checklist_is_written_and_compared(tmp_path: Path) -> None:
    config, state = read_state(make_folder(tmp_path / "a", 1))
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(b"pieces")
    meta.save_meta(folder, config, state, dtype=torch.float16, shards=2)
    lines = dict(reversed(line.split("  ")) for line in (folder / "checklist.chk").read_text().splitlines())
    assert sorted(lines) == ["consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.model"]
    assert lines["tokenizer.model"] == hashlib.md5(b"pieces").hexdigest()
    meta.open_meta(folder, 96)
    shard = folder / "consolidated.01.pth"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptFile, match=r"consolidated\.01\.pth: md5"):
        meta.open_meta(folder, 96)
    shard.unlink()
    with pytest.raises(CorruptFile, match=r"consolidated\.01\.pth"):
        meta.open_meta(folder, 96)


def test_a_shard_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a", 1)
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    torch.save({"norm.weight": Hostile()}, folder / "consolidated.00.pth")
    with pytest.raises(CorruptFile, match=r"consolidated\.00\.pth"):
        meta.open_meta(folder, 96)
    assert not canary.exists()


@pytest.mark.parametrize("kept_fraction", [0.0, 0.4, 0.99])
def test_a_truncated_shard_is_named(tmp_path: Path, kept_fraction: float) -> None:
    shard = make_folder(tmp_path / "a", 1) / "consolidated.00.pth"
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * kept_fraction)])
    with pytest.raises(CorruptFile, match=r"consolidated\.00\.pth"):
        meta.open_meta(shard.parent, 96)


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    state = Transformer(CONFIG).state_dict()
    with pytest.raises(UserError, match="shards = 3"):
        meta.save_meta(tmp_path, CONFIG, state, dtype=torch.float16, shards=3)
    with pytest.raises(UserError, match="head_dim"):
        meta.save_meta(tmp_path, ModelConfig(96, 32, 2, 8, 4, 8, 48), state, dtype=torch.float16)


def test_a_tied_model_gets_a_head_of_its_own(tmp_path: Path) -> None:
    config = ModelConfig(96, 32, 2, 8, 4, 4, 96, tie_embeddings=True)
    model = Transformer(config)
    model.init_weights(0)
    meta.save_meta(tmp_path, config, model.state_dict(), dtype=torch.float32, shards=2)
    _, state = read_state(tmp_path)
    assert torch.equal(state["head.weight"], model.embed.weight)
