"""Whole models in and out: weights, shape, tokenizer and chat format together, whatever the format on disk.

Choice: what a path holds is told by what lies there: a folder with config.json is Hugging Face's (every model artifact
of ours is one), with params.json Meta's; a file ending in .gguf is llama.cpp's, in .bin llama2.c's.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from groundup.base.artifacts import LOGS, MANIFEST, Artifact
from groundup.base.errors import UserError
from groundup.base.files import atomic_file, fsync_tree, read_json, recover_folder, replace_folder
from groundup.model.config import ModelConfig
from groundup.model.transformer import Transformer
from groundup.model.weights import gguf, hf, layout, llama2c, meta
from groundup.model.weights.gguf import Quantisation
from groundup.model.weights.layout import WeightsFile
from groundup.text.chat import ChatFormat, chat_format_from_template, load_chat_format
from groundup.text.tokenizer import (
    TOKENIZER_JSON,
    TOKENIZER_MODEL,
    Tokenizer,
    load_tokenizer,
    tokenizer_from_gguf_fields,
)

Format = Literal["hf", "meta", "gguf", "llama2c"]
_OPTIONS: dict[str, tuple[str, ...]] = {
    "hf": ("dtype",),
    "meta": ("dtype", "shards"),
    "gguf": ("quantisation",),
    "llama2c": (),
}
_GGUF_TEMPLATE = "tokenizer.chat_template"
_UNUSED_SCORE, _UNUSED_TYPE = -1000.0, 5


Opened = tuple[WeightsFile, Tokenizer, ChatFormat]


@dataclass
class Checkpoint:
    """A model and all that is needed to talk to it."""

    model: Transformer
    config: ModelConfig
    tokenizer: Tokenizer
    chat: ChatFormat
    generation: dict[str, Any]
    """What generation_config.json says; empty for formats without one."""


def load_checkpoint(path: Path, dtype: torch.dtype | None = None, tokenizer: Path | None = None) -> Checkpoint:
    """Load a model in any of the formats, on the CPU.

    `dtype` None keeps every stored value exactly (quantised files become float32); `tokenizer` replaces the one that
    lies with the model. Files that a manifest of ours lists are compared with it first.

    Raises: UserError for what is missing, unsupported or does not fit together; CorruptFile for a broken file.
    """
    weights, vocabulary, chat = open_checkpoint(path, tokenizer)
    model = build_model(weights.config, layout.fuse(weights.config, weights.parts, dtype or weights.dtype))
    return Checkpoint(model, weights.config, vocabulary, chat, weights.generation)


def open_checkpoint(path: Path, tokenizer: Path | None = None) -> Opened:
    """What `load_checkpoint` loads, before any weights are read: for those who need only what lies around them."""
    recover_folder(path)
    if not path.exists():
        raise UserError(f"{path}: no such model")
    weights, vocabulary, chat = _OPENERS[_detect(path)](path, tokenizer)
    if vocabulary.vocab_size > weights.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {vocabulary.vocab_size} ids, but the model's embedding only "
            f"{weights.config.vocab_size} rows",
            "this is not the tokenizer that the model was trained with",
        )
    return weights, vocabulary, chat


def build_model(config: ModelConfig, state: Mapping[str, Tensor]) -> Transformer:
    """A model whose parameters are these very tensors, so that building it takes no second copy of the memory."""
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(state, strict=True, assign=True)
    return model


def save_checkpoint(
    folder: Path,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = hf.DEFAULT_SHARD_BYTES,
) -> None:
    """Write an ordinary Hugging Face folder, synced to the disk; `dtype` None keeps the model's.

    Raises: UserError if the folder already holds weights.
    """
    if any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin")):
        raise UserError(f"{folder}: already holds weights", "write to a new folder")
    tokenizer, chat = checkpoint.tokenizer, checkpoint.chat
    stop_ids = sorted({tokenizer.eos_id, *chat.stop_ids})
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    stops = {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    tokenizer.save(folder, chat.template)
    hf.save_hf(
        folder,
        checkpoint.config,
        _state(checkpoint),
        dtype=dtype or _dtype(checkpoint),
        token_ids=ids,
        generation={**ids, **stops, **checkpoint.generation},
        max_shard_bytes=max_shard_bytes,
    )
    fsync_tree(folder)


def convert(
    source: Path,
    target: Path,
    to: Format,
    *,
    dtype: torch.dtype | None = None,
    shards: int | None = None,
    quantisation: Quantisation | None = None,
    max_shard_bytes: int = hf.DEFAULT_SHARD_BYTES,
    tokenizer: Path | None = None,
) -> None:
    """Write the model at `source` to `target` in another format; `target` appears only when it is whole.

    `dtype` is for hf and meta, `shards` (model-parallel ranks, default 1) for meta, `quantisation` (default f16) for
    gguf.

    Raises: UserError if `target` exists, an option is not the format's, or the format cannot hold the model.
    """
    if target.exists():
        raise UserError(f"{target}: already exists", "remove it or write elsewhere")
    if to not in _OPTIONS:
        raise UserError(f"unknown format {to!r}", f"use {', '.join(_OPTIONS)}")
    for name, value in (("dtype", dtype), ("shards", shards), ("quantisation", quantisation)):
        if value is not None and name not in _OPTIONS[to]:
            raise UserError(f"{name} = {value} does not apply to format {to!r}")
    checkpoint = load_checkpoint(source, tokenizer=tokenizer)
    config, state = checkpoint.config, _state(checkpoint)
    if to == "hf":
        with _new_folder(target) as folder:
            save_checkpoint(folder, checkpoint, dtype, max_shard_bytes)
    elif to == "meta":
        with _new_folder(target) as folder:
            checkpoint.tokenizer.save(folder, checkpoint.chat.template)
            meta.save_meta(folder, config, state, dtype=dtype or _dtype(checkpoint), shards=shards or 1)
    elif to == "gguf":
        vocabulary = _padded(checkpoint.tokenizer.gguf_fields(), config.vocab_size)
        vocabulary[_GGUF_TEMPLATE] = checkpoint.chat.template
        gguf.save_gguf(target, config, state, vocabulary, name=target.stem, quantisation=quantisation or "f16")
    else:
        vocabulary = _padded(checkpoint.tokenizer.gguf_fields(), config.vocab_size)
        pieces, beside = llama2c.llama2c_tokenizer(vocabulary), target.with_name(f"tok{config.vocab_size}.bin")
        if beside.exists() and beside.read_bytes() != pieces:
            raise UserError(f"{beside}: already exists and is another tokenizer", "write to another folder")
        llama2c.save_llama2c(target, config, state)
        with atomic_file(beside) as temporary:
            temporary.write_bytes(pieces)


def _open_hf(path: Path, tokenizer: Path | None) -> Opened:
    verify_manifest(path)
    weights = hf.open_hf(path)
    vocabulary = load_tokenizer(tokenizer or path)
    return weights, vocabulary, load_chat_format(path, vocabulary)


def _open_meta(path: Path, tokenizer: Path | None) -> Opened:
    # Meta keeps one tokenizer for all sizes, a folder up.
    beside = path if _has_tokenizer(path) else path.parent
    vocabulary = load_tokenizer(tokenizer or beside)
    return meta.open_meta(path, vocabulary.vocab_size), vocabulary, load_chat_format(path, vocabulary)


def _open_gguf(path: Path, tokenizer: Path | None) -> Opened:
    weights, fields = gguf.open_gguf(path)
    vocabulary = load_tokenizer(tokenizer) if tokenizer else tokenizer_from_gguf_fields(fields)
    return weights, vocabulary, chat_format_from_template(fields.get(_GGUF_TEMPLATE), vocabulary)


def _open_llama2c(path: Path, tokenizer: Path | None) -> Opened:
    weights = llama2c.open_llama2c(path)
    names = (f"tok{weights.config.vocab_size}.bin", "tokenizer.bin", "tokenizer.model")
    beside = [path.with_name(name) for name in names if path.with_name(name).exists()]
    if tokenizer is None and not beside:
        raise UserError(f"{path}: no tokenizer beside it (looked for {', '.join(names)})", "give its path as tokenizer")
    vocabulary = load_tokenizer(tokenizer or beside[0])
    return weights, vocabulary, chat_format_from_template(None, vocabulary)


_OPENERS: dict[Format, Callable[[Path, Path | None], Opened]] = {
    "hf": _open_hf,
    "meta": _open_meta,
    "gguf": _open_gguf,
    "llama2c": _open_llama2c,
}


def _has_tokenizer(folder: Path) -> bool:
    return (folder / TOKENIZER_MODEL).exists() or (folder / TOKENIZER_JSON).exists()


def verify_manifest(folder: Path) -> None:
    """Compare the files with the manifest if the folder is an artifact of ours; a manifest of another kind is not."""
    if not (folder / MANIFEST).exists():
        return
    manifest = read_json(folder / MANIFEST)
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) and "kind" in manifest:
        files = {name: entry for name, entry in manifest["files"].items() if Path(name).parts[0] != LOGS}
        Artifact(folder, {**manifest, "files": files}).verify()


def _state(checkpoint: Checkpoint) -> dict[str, Tensor]:
    state: dict[str, Tensor] = checkpoint.model.state_dict()
    assert list(state) == layout.state_names(checkpoint.config), "the state dict is not a Transformer's"
    return state


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    return checkpoint.model.embed.weight.dtype


def _padded(vocabulary: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The vocabulary with unused entries up to the number of embedding rows, which these formats need to be equal."""
    padded = dict(vocabulary)
    first = len(vocabulary["tokenizer.ggml.tokens"])
    fillers: dict[str, list[Any]] = {
        "tokens": [f"[PAD{index}]" for index in range(first, rows)],
        "scores": [_UNUSED_SCORE] * (rows - first),
        "token_type": [_UNUSED_TYPE] * (rows - first),
    }
    for name, filler in fillers.items():
        if (key := f"tokenizer.ggml.{name}") in padded:
            padded[key] = [*padded[key], *filler]
    return padded


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    temporary = target.with_name(f".{target.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _detect(path: Path) -> Format:
    if path.is_dir():
        if (path / hf.CONFIG).exists():
            return "hf"
        if (path / meta.PARAMS).exists():
            return "meta"
        raise UserError(f"{path}: no model folder (neither {hf.CONFIG} nor {meta.PARAMS})")
    if path.suffix == ".gguf":
        return "gguf"
    if (path.parent / hf.CONFIG).exists() or (path.parent / meta.PARAMS).exists():
        raise UserError(f"{path}: one file of a model folder", f"give the folder: {path.parent}")
    if path.suffix == ".bin":
        return "llama2c"
    raise UserError(f"{path}: not a model", "give a Hugging Face or Meta folder, a *.gguf or a llama2.c *.bin file")
