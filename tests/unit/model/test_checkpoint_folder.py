"""Whole models: every format opens by its path, converts to every other, and says plainly what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from groundup.base.artifacts import new_artifact
from groundup.base.errors import CorruptFile, UserError
from groundup.model.checkpoint import Checkpoint, build_model, convert, load_checkpoint, save_checkpoint
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.text.chat import load_chat_format
from groundup.text.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, Piece
from groundup.text.sentencepiece_model import build_model as build_pieces
from groundup.text.tokenizer import SentencePieceTokenizer, Tokenizer

WORDS = ["▁", *"helowrd", "▁h", "▁w", "el", "lo", "or", "ld", "▁hel", "▁wor", "▁hello", "▁world"]


def make_tokenizer() -> Tokenizer:
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    pieces += [Piece(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [Piece(word, -float(rank), NORMAL) for rank, word in enumerate(sorted(WORDS, key=len, reverse=True))]
    return SentencePieceTokenizer(build_pieces(pieces, unk_id=0, bos_id=1, eos_id=2))


def make_checkpoint(folder: Path, dtype: torch.dtype = torch.float32, **changes) -> Checkpoint:
    config = ModelConfig(**{**ModelConfig(288, 64, 2, 4, 2, 16, 96, 4096).__dict__, **changes})
    model = Transformer(config)
    model.init_weights(0)
    tokenizer = make_tokenizer()
    tokenizer.save(folder)
    return Checkpoint(model.to(dtype), config, tokenizer, load_chat_format(folder, tokenizer), {})


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "hf", make_checkpoint(tmp_path / "scratch"))
    return tmp_path / "hf"


def states_are_equal(first: Transformer, second: Transformer) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_loads_the_same(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    saved = make_checkpoint(tmp_path / "scratch", dtype, tie_embeddings=tied)
    saved.generation["temperature"] = 0.7
    save_checkpoint(tmp_path / "m", saved)
    loaded = load_checkpoint(tmp_path / "m")
    assert loaded.config == saved.config
    assert states_are_equal(loaded.model, saved.model)
    assert loaded.tokenizer.encode("hello world") == saved.tokenizer.encode("hello world")
    assert loaded.chat.template == saved.chat.template
    assert loaded.generation["temperature"] == 0.7
    assert loaded.generation["eos_token_id"] == 2
    tokens = torch.tensor([[1, 5, 9]])
    assert torch.equal(loaded.model(tokens), saved.model(tokens))
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())


def test_dtype_is_changed_only_when_asked(tmp_path: Path) -> None:
    saved = make_checkpoint(tmp_path / "scratch")
    save_checkpoint(tmp_path / "m", saved, dtype=torch.bfloat16)
    assert load_checkpoint(tmp_path / "m").model.embed.weight.dtype == torch.bfloat16
    widened = load_checkpoint(tmp_path / "m", torch.float32)
    assert torch.equal(widened.model.embed.weight, saved.model.embed.weight.bfloat16().float())


def test_loading_builds_no_second_copy() -> None:
    config = ModelConfig(288, 64, 2, 4, 2, 16, 96)
    state = Transformer(config).state_dict()
    model = build_model(config, state)
    assert all(parameter.data_ptr() == state[name].data_ptr() for name, parameter in model.named_parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        build_model(config, {name: tensor for name, tensor in state.items() if name != "norm.weight"})


@pytest.mark.parametrize(
    "path", [["hf"], ["meta", "hf"], ["gguf", "hf"], ["llama2c", "hf"], ["gguf", "llama2c", "meta"]]
)
def test_a_chain_of_conversions_changes_nothing(tmp_path: Path, source: Path, path: list[str]) -> None:
    current = source
    for number, to in enumerate(path):
        target = tmp_path / str(number) / ("model" + {"gguf": ".gguf", "llama2c": ".bin"}.get(to, ""))
        target.parent.mkdir()
        options = {"meta": {"shards": 2}, "gguf": {"quantisation": "f32"}}.get(to, {})
        convert(current, target, to, **options)
        current = target
    first, last = load_checkpoint(source), load_checkpoint(current)
    assert last.config == first.config
    assert states_are_equal(first.model, last.model)
    assert last.tokenizer.encode("hello <s> wörld") == first.tokenizer.encode("hello <s> wörld")


def test_a_meta_folder_finds_its_tokenizer_one_folder_up(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "llama" / "7b", "meta", dtype=torch.float16)
    folder = tmp_path / "llama" / "7b"
    lines = (folder / "checklist.chk").read_text().splitlines(keepends=True)
    (folder / "checklist.chk").write_text(
        "".join(line for line in lines if "token" not in line and "jinja" not in line)
    )
    for file in folder.glob("*token*"):
        file.rename(folder.parent / file.name)
    params = json.loads((folder / "params.json").read_text())
    (folder / "checklist.chk").unlink()
    (folder / "params.json").write_text(json.dumps({**params, "vocab_size": -1}))
    with pytest.raises(UserError, match=r"embed|shape"):  # -1: as many as the tokenizer has, and this one has fewer
        load_checkpoint(folder)
    (folder / "params.json").write_text(json.dumps(params))
    loaded = load_checkpoint(folder)
    assert loaded.model.embed.weight.dtype == torch.float16
    assert loaded.tokenizer.encode("hello") == make_tokenizer().encode("hello")


def test_a_flipped_bit_in_an_artifact_is_found(tmp_path: Path, source: Path) -> None:
    with new_artifact(tmp_path / "base", {"kind": "model"}) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        (folder / "logs").mkdir()
        (folder / "logs" / "metrics.jsonl").write_text("{}\n")
    artifact = tmp_path / "base"
    (artifact / "logs" / "metrics.jsonl").unlink()
    load_checkpoint(artifact)
    for name in ("model.safetensors", "config.json", "tokenizer.model"):
        data = (artifact / name).read_bytes()
        changed = bytearray(data)
        changed[len(data) * 2 // 3] ^= 4
        (artifact / name).write_bytes(changed)
        with pytest.raises(CorruptFile, match=f"{name}: sha256"):
            load_checkpoint(artifact)
        (artifact / name).write_bytes(data)
    load_checkpoint(artifact)


def test_another_programs_manifest_is_left_alone(source: Path) -> None:
    (source / "manifest.json").write_text('{"files": ["model.safetensors"]}')
    load_checkpoint(source)


def test_a_tokenizer_larger_than_the_embedding_names_both(tmp_path: Path) -> None:
    size = make_tokenizer().vocab_size
    save_checkpoint(tmp_path / "m", make_checkpoint(tmp_path / "scratch", vocab_size=size - 1))
    with pytest.raises(UserError, match=rf"tokenizer has {size} ids.*only {size - 1} rows"):
        load_checkpoint(tmp_path / "m")


def test_paths_that_hold_no_model_are_explained(tmp_path: Path, source: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "alone.bin").write_bytes(bytes(10))
    expected = {
        tmp_path / "absent": "no such model",
        tmp_path / "empty": "no model folder",
        tmp_path / "notes.txt": "not a model",
        tmp_path / "alone.bin": "too short",
        source / "model.safetensors": f"give the folder: {source}",
    }
    for path, words in expected.items():
        with pytest.raises(UserError, match=words) as caught:
            load_checkpoint(path)
        assert str(path) in str(caught.value)
    (source / "tokenizer.model").unlink()
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_checkpoint(source)


def test_a_llama2c_file_without_a_tokenizer_asks_for_one(tmp_path: Path, source: Path) -> None:
    (tmp_path / "c").mkdir()
    convert(source, tmp_path / "c" / "model.bin", "llama2c")
    pieces = (tmp_path / "c" / "tok288.bin").rename(tmp_path / "pieces.bin")
    with pytest.raises(UserError, match=r"looked for tok288\.bin"):
        load_checkpoint(tmp_path / "c" / "model.bin")
    loaded = load_checkpoint(tmp_path / "c" / "model.bin", tokenizer=pieces)
    assert loaded.tokenizer.encode("hello") == make_tokenizer().encode("hello")


def test_nothing_is_overwritten_and_failures_leave_nothing(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match="already exists"):
        convert(source, source, "hf")
    with pytest.raises(UserError, match="already holds weights"):
        save_checkpoint(source, load_checkpoint(source))
    with pytest.raises(UserError, match="shards = 5"):
        convert(source, tmp_path / "m", "meta", shards=5)
    with pytest.raises(UserError, match="shards = 2 does not apply to format 'gguf'"):
        convert(source, tmp_path / "m.gguf", "gguf", shards=2)
    with pytest.raises(UserError, match="unknown format 'onnx'"):
        convert(source, tmp_path / "m", "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "scratch"]
    (tmp_path / "tok288.bin").write_bytes(b"another model's")
    with pytest.raises(UserError, match=r"tok288\.bin: already exists and is another tokenizer"):
        convert(source, tmp_path / "m.bin", "llama2c")
    assert (tmp_path / "tok288.bin").read_bytes() == b"another model's"
    assert not (tmp_path / "m.bin").exists()
