"""GGUF files: the gguf package is the oracle for the container and for quantised values."""

import dataclasses
import math
import struct
from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter

from groundup.base.errors import CorruptFile, UserError
from groundup.model.config import ModelConfig, RopeScaling
from groundup.model.transformer import Transformer, rope_frequencies
from groundup.model.weights import gguf, layout
from groundup.model.weights.gguf_file import read_gguf_file

CONFIG = ModelConfig(96, 64, 2, 4, 2, 16, 96, 128)
VOCABULARY = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [f"piece {index} ▁é" for index in range(96)],
    "tokenizer.ggml.scores": [-float(index) for index in range(96)],
    "tokenizer.ggml.token_type": [1] * 96,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}
READABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def state_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    model = Transformer(config)
    model.init_weights(5)
    return model.state_dict()


def save(path: Path, config: ModelConfig = CONFIG, quantisation: gguf.Quantisation = "f32") -> dict[str, torch.Tensor]:
    state = state_of(config)
    gguf.save_gguf(path, config, state, VOCABULARY, name="tiny", quantisation=quantisation)
    return state


def read_state(path: Path) -> dict[str, torch.Tensor]:
    opened, _ = gguf.open_gguf(path)
    return layout.fuse(opened.config, opened.parts, torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_float32_comes_back_unchanged_with_config_and_vocabulary(tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=tied, norm_eps=1e-6, rope_theta=5e5)
    state = save(tmp_path / "m.gguf", config)
    opened, fields = gguf.open_gguf(tmp_path / "m.gguf")
    assert (opened.config, opened.dtype, fields) == (config, torch.float32, VOCABULARY)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_state(tmp_path / "m.gguf").items())


@pytest.mark.parametrize(("quantisation", "tolerance"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_written_values_are_close_and_norms_exact(tmp_path: Path, quantisation: str, tolerance: float) -> None:
    state = save(tmp_path / "m.gguf", quantisation=quantisation)
    for name, tensor in read_state(tmp_path / "m.gguf").items():
        if tensor.dim() == 1:
            assert torch.equal(tensor, state[name])
        else:
            assert 0 < (tensor - state[name]).abs().max() <= tolerance * state[name].abs().max()
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors if len(tensor.shape) == 2}
    assert kinds == {quantisation.upper()}


def test_rows_that_do_not_fill_q8_blocks_stay_f16_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save(tmp_path / "m.gguf", ModelConfig(96, 64, 1, 4, 2, 16, 100), "q8_0")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert "1 matrices, e.g. blk.0.ffn_down.weight" in capsys.readouterr().err


def test_query_rows_are_written_in_the_order_llama_cpp_wants(tmp_path: Path) -> None:
    state = save(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    ours = state["blocks.1.attention.wqkv.weight"][:64].numpy()
    # llama.cpp's converter: split each head in halves and interleave them.
    expected = ours.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight"], expected)


def test_the_container_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int64("a.i64", -5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "é" * 40)
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.strings", ["x", "", "▁y"])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    for name in READABLE:
        block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        raw = rng.integers(0, 60, (3, 512 // block_values * block_bytes), np.uint8)
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[name])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    ours, theirs = read_gguf_file(path), GGUFReader(path)
    expected = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.fields == expected
    assert len(expected) == 10
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors] == list(READABLE)
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        values = library.quants.dequantize(tensor.data.view(np.uint8), tensor.tensor_type)
        assert stored.shape == (3, 512)
        np.testing.assert_array_equal(stored.read().float().numpy(), values, err_msg=tensor.name)


@pytest.mark.parametrize(
    "scaling",
    [RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0), RopeScaling("llama3", 32.0)],
    ids=lambda scaling: f"{scaling.kind} {scaling.factor}",
)
def test_rope_scaling_comes_back(tmp_path: Path, scaling: RopeScaling) -> None:
    config = dataclasses.replace(CONFIG, head_dim=64, rope_theta=5e5, rope_scaling=scaling)
    save(tmp_path / "m.gguf", config)
    assert gguf.open_gguf(tmp_path / "m.gguf")[0].config == config
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    if scaling.kind == "llama3":
        plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None)).numpy()
        np.testing.assert_allclose(plain / tensors["rope_freqs.weight"], rope_frequencies(config).numpy(), rtol=1e-6)
    else:
        assert "rope_freqs.weight" not in tensors


def test_other_rope_factors_are_refused(tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 8.0, low_freq_factor=2.0)
    save(tmp_path / "m.gguf", dataclasses.replace(CONFIG, head_dim=64, rope_scaling=scaling))
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        gguf.open_gguf(tmp_path / "m.gguf")


def write_fields(path: Path, arch: str = "llama", **changes: object) -> None:
    """A GGUF file of one embedding and a Llama's fields with changes; `__` stands for a dot."""
    writer = GGUFWriter(path, arch)
    gguf._add_config(writer, CONFIG, "tiny", library.LlamaFileType.ALL_F32)
    for key, value in changes.items():
        name = key.replace("__", ".")
        for data in writer.kv_data:
            data.pop(name, None)
        if isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            gguf._add_field(writer, name, value)
    writer.add_tensor("token_embd.weight", np.zeros((96, 64), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2'"),
        ({"llama__expert_count": 8}, r"llama\.expert_count"),
        ({"llama__attention__sliding_window": 128}, "sliding_window"),
        ({"llama__rope__scaling__type": "yarn"}, "'yarn'"),
        ({"llama__rope__dimension_count": 8}, r"rope\.dimension_count = 8"),
        ({"llama__attention__head_count_kv": [2, 2]}, r"head_count_kv = \[2, 2\]"),
        ({"llama__attention__head_count": 0}, r"head_count = 0"),
        ({"llama__block_count": None}, r"block_count = None"),
        ({"llama__block_count": 2**31}, "2147483648 layers"),
        ({"split__count": 3}, "one of 3 pieces"),
        ({"llama__block_count": 1}, r"missing .*attn_norm\.weight"),
    ],
    ids=str,
)
def test_what_is_not_a_plain_llama_is_refused_by_name(tmp_path: Path, changes: dict, words: str) -> None:
    write_fields(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=words) as caught:
        gguf.open_gguf(tmp_path / "m.gguf")
    assert "m.gguf" in str(caught.value)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    save(path, ModelConfig(96, 32, 1, 2, 1, 16, 32))
    data = path.read_bytes()
    cuts = [
        *range(4, 400, 3),
        *(int(len(data) * fraction) for fraction in np.linspace(0.01, 0.995, 60)),
        len(data) - 40,
    ]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(CorruptFile, match=r"m\.gguf"):
            gguf.open_gguf(path)


def test_made_up_counts_end_quickly(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    huge = 2**62
    key = struct.pack("<Q", 1) + b"k"
    hostile = {
        "fields": struct.pack("<IQQ", 3, 0, huge),
        "tensors": struct.pack("<IQQ", 3, huge, 0),
        "string": struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IQ", 8, huge),
        "array": struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 4, huge),
        "strings": struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 8, huge),
        "empty array of arrays": struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<IIQ", 9, 9, huge),
        "unknown type": struct.pack("<IQQ", 3, 0, 1) + key + struct.pack("<I", 77),
        "dimensions": struct.pack("<IQQ", 3, 1, 0) + key + struct.pack("<I", huge % 2**32),
        "overflow": struct.pack("<IQQ", 3, 1, 0) + key + struct.pack("<IQQIQ", 2, 2**33, 2**33, 0, 0),
        "offset": struct.pack("<IQQ", 3, 1, 0) + key + struct.pack("<IQIQ", 1, 4, 0, 2**63),
    }
    for tail in hostile.values():
        path.write_bytes(b"GGUF" + tail + bytes(64))
        with pytest.raises(UserError, match=r"m\.gguf"):
            gguf.open_gguf(path)


def test_flipped_bytes_in_the_header_give_one_clear_error_or_a_model(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    save(path, ModelConfig(96, 32, 1, 2, 1, 16, 32))
    data = path.read_bytes()
    header_bytes = len(data) - sum(tensor.n_bytes for tensor in GGUFReader(path).tensors)
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(400):
        changed = bytearray(data)
        at = int(rng.integers(0, header_bytes))
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        try:
            opened, _ = gguf.open_gguf(path)
            sizes = sum(math.prod(stored.read().shape) for stored in opened.parts.values())
            assert sizes * 4 <= len(data)
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all("m.gguf" in message for message in messages)


def test_what_is_no_gguf_or_of_an_unknown_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CorruptFile, match="not a GGUF file"):
        gguf.open_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(100))
    with pytest.raises(UserError, match="version 1"):
        gguf.open_gguf(path)
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("x", np.zeros((2, 66), np.uint8), raw_dtype=GGMLQuantizationType.IQ2_XXS)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(UserError, match="'x' has type IQ2_XXS"):
        gguf.open_gguf(path)
