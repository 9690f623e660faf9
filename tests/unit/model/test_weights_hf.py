"""Hugging Face folders: transformers writes, we read and write, and every bit is the same."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from groundup.base.errors import CorruptFile, UserError
from groundup.model.config import ModelConfig, RopeScaling
from groundup.model.weights import hf, layout

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def make_folder(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes) -> Path:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "rms_norm_eps": 1e-5, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def rewrite(folder: Path, **changes) -> None:
    """Replace tensors of model.safetensors; None removes one."""
    tensors = {**tensors_of(folder), **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def copy_through(source: Path, target: Path, max_shard_bytes: int = hf.DEFAULT_SHARD_BYTES) -> hf.WeightsFile:
    opened = hf.open_hf(source)
    state = layout.fuse(opened.config, opened.parts, opened.dtype)
    hf.save_hf(
        target, opened.config, state, dtype=opened.dtype, token_ids=TOKEN_IDS, generation=opened.generation,
        max_shard_bytes=max_shard_bytes,
    )  # fmt: skip
    return opened


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one file", "sharded"])
def test_a_round_trip_changes_no_bit(tmp_path: Path, dtype: torch.dtype, tied: bool, shard: str) -> None:
    source = make_folder(tmp_path / "a", dtype, shard, tie_word_embeddings=tied)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard == "20KB")
    opened = copy_through(source, tmp_path / "b", 20_000 if shard == "20KB" else hf.DEFAULT_SHARD_BYTES)
    assert opened.dtype == dtype
    before, after = tensors_of(source), tensors_of(tmp_path / "b")
    assert before.keys() == after.keys()
    assert len(before) == 2 + 2 * 9 + (not tied)
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert hf.open_hf(tmp_path / "b").config == opened.config


def test_shards_obey_the_limit_and_the_index_is_complete(tmp_path: Path) -> None:
    copy_through(make_folder(tmp_path / "a"), tmp_path / "b", 20_000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "b").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    total = 0
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(tmp_path / "b" / file).values()]
        total += sum(sizes)
        assert sum(sizes) <= 20_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == total


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32, "rope_theta": 1e4,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_the_written_config_means_the_same_to_transformers(tmp_path: Path, rope: dict) -> None:
    source = make_folder(tmp_path / "a", rope_parameters=rope, head_dim=16, tie_word_embeddings=True)
    copy_through(source, tmp_path / "b")
    first, second = LlamaConfig.from_pretrained(source), LlamaConfig.from_pretrained(tmp_path / "b")
    assert second.rope_parameters == first.rope_parameters == rope
    for key in (*SHAPE, "head_dim", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "attention_bias", "dtype"):
        assert getattr(first, key) == getattr(second, key), key


@pytest.mark.parametrize("old_style", [False, True])
def test_rope_is_read_in_both_spellings(tmp_path: Path, old_style: bool) -> None:
    folder = make_folder(tmp_path)
    scaling = {"type": "linear", "factor": 2}
    if old_style:
        edit_config(folder, rope_parameters=None, rope_theta=50_000, rope_scaling=scaling)
    else:
        edit_config(folder, rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 50_000})
    config = hf.open_hf(folder).config
    assert (config.rope_theta, config.rope_scaling) == (50_000, RopeScaling("linear", 2.0))


def test_absent_keys_take_the_defaults_of_llama_config(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, num_key_value_heads=4)
    optional = ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in optional}))
    assert hf.open_hf(folder).config == ModelConfig(96, 32, 2, 4, 4, 8, 48, 64, 1e-6, 10_000.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen2"}, "model_type = 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"sliding_window": 128}, "sliding_window = 128"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type = 'yarn'"),
        ({"rope_theta": 5e5}, "rope_theta = 500000.0"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers = 'two'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, r"rope_scaling\.factor = 0\.5"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": "x"}}, r"rope_parameters\.rope_theta = 'x'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers"),
        ({"num_attention_heads": 3}, "n_heads = 3"),
        ({"hidden_size": None}, "hidden_size = None"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_not_a_llama_is_refused_by_name(tmp_path: Path, changes: dict, words: str) -> None:
    folder = make_folder(tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=words) as caught:
        hf.open_hf(folder)
    assert str(tmp_path) in str(caught.value)


def test_a_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)).save_pretrained(tmp_path)
    assert hf.open_hf(tmp_path).config.n_kv_heads == 2
    values = json.loads((tmp_path / "config.json").read_text())
    del values["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="sliding_window = 4096"):
        hf.open_hf(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_older_pickled_folders_are_read_and_tables_ignored(tmp_path: Path, sharded: bool) -> None:
    source = make_folder(tmp_path / "a", torch.float16)
    tensors = tensors_of(source)
    expected = layout.fuse(hf.open_hf(source).config, hf.open_hf(source).parts, torch.float16)
    (source / "model.safetensors").unlink()
    stored = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if sharded:
        names = sorted(stored)
        files = {"pytorch_model-00001-of-00002.bin": names[:7], "pytorch_model-00002-of-00002.bin": names[7:]}
        for file, group in files.items():
            torch.save({name: stored[name] for name in group}, source / file)
        weight_map = {name: file for file, group in files.items() for name in group}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(stored, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    opened = hf.open_hf(source)
    assert opened.dtype == torch.float16
    state = layout.fuse(opened.config, opened.parts, torch.float16)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    for protocol in ("zip", "pickle"):
        if protocol == "zip":
            torch.save({"model.norm.weight": Hostile()}, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Hostile()}, protocol=2))
        with pytest.raises(UserError, match=r"pytorch_model\.bin"):
            hf.open_hf(folder)
        assert not canary.exists()
    pickle.loads(pickle.dumps(Hostile()))
    assert canary.exists(), "the test's own pickle is harmless, so it proves nothing"


def test_quantised_tensors_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    tensors = {**tensors_of(folder), "model.norm.weight": torch.zeros(32, dtype=torch.int8)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight has type I8"):
        hf.open_hf(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.norm\.weight is of type torch\.int8"):
        hf.open_hf(folder)


def test_a_wrong_shape_names_the_tensor(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    rewrite(folder, model__layers__1__mlp__down_proj__weight=torch.zeros(32, 47))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight has shape \[32, 47\].*\[32, 48\]"):
        hf.open_hf(folder)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    rewrite(folder, model__norm__weight=None, model__layers__0__self_attn__q_proj__bias=torch.zeros(32))
    with pytest.raises(UserError, match=r"missing model\.norm\.weight; unexpected .*q_proj\.bias"):
        hf.open_hf(folder)


def test_a_head_that_contradicts_tying_is_an_error(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, tie_word_embeddings=True)
    embedding = tensors_of(folder)["model.embed_tokens.weight"]
    rewrite(folder, lm_head__weight=embedding.clone())
    assert hf.open_hf(folder).config.tie_embeddings
    rewrite(folder, lm_head__weight=embedding + 1)
    with pytest.raises(UserError, match="tie_word_embeddings = true"):
        hf.open_hf(folder)


@pytest.mark.parametrize("kept_fraction", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_named(tmp_path: Path, kept_fraction: float) -> None:
    file = make_folder(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept_fraction)])
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        hf.open_hf(tmp_path)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, shard="20KB")
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    second = sorted(folder.glob("*.safetensors"))[1]
    index.write_text(whole.replace(second.name, f"../{second.name}"))
    with pytest.raises(UserError, match="not a file name in the same folder"):
        hf.open_hf(folder)
    index.write_text(whole.replace("model.norm.weight", "model.norm.other"))
    with pytest.raises(CorruptFile, match=r"model\.norm\.other"):
        hf.open_hf(folder)
    index.write_text(whole)
    second.unlink()
    with pytest.raises(UserError, match=second.name):
        hf.open_hf(folder)


def test_a_folder_without_weights_or_with_two_kinds_is_an_error(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="holds both"):
        hf.open_hf(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        hf.open_hf(folder)
