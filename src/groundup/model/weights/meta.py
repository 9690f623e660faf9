"""Meta's own checkpoints: params.json beside consolidated.NN.pth, one file for each model-parallel rank.

Source: the released model code (ModelArgs, parallel layers) and its converter; docs/architecture.md for the row order.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundup.base.errors import CorruptFile, UserError
from groundup.base.files import atomic_file, read_json, write_json, write_text
from groundup.base.progress import say
from groundup.model.config import ModelConfig, ffn_width
from groundup.model.weights import layout
from groundup.model.weights.fields import Fields, checked
from groundup.model.weights.layout import Stored, WeightsFile
from groundup.model.weights.torchfile import open_torch_file

PARAMS, CHECKLIST = "params.json", "checklist.chk"
_SHARDS = "consolidated.*.pth"
_MAX_POSITIONS = 4096
"""Choice: params.json does not give the context length; this is Llama 2's."""
_KEYS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size",
}  # fmt: skip

_TOP_NAMES = {layout.EMBED: "tok_embeddings.weight", layout.NORM: "norm.weight", layout.HEAD: "output.weight"}
_BLOCK_NAMES = {
    layout.ATTENTION_NORM: "attention_norm.weight",
    layout.WQ: "attention.wq.weight",
    layout.WK: "attention.wk.weight",
    layout.WV: "attention.wv.weight",
    layout.WO: "attention.wo.weight",
    layout.FFN_NORM: "ffn_norm.weight",
    layout.W1: "feed_forward.w1.weight",
    layout.W2: "feed_forward.w2.weight",
    layout.W3: "feed_forward.w3.weight",
}
_SPLIT_COLUMNS = ("tok_embeddings.weight", "attention.wo.weight", "feed_forward.w2.weight")
_RECOMPUTED = "rope.freqs"


def meta_name(part: str) -> str:
    """The tensor name in Meta's files."""
    if part in _TOP_NAMES:
        return _TOP_NAMES[part]
    _, layer, local = part.split(".", 2)
    return f"layers.{layer}.{_BLOCK_NAMES[local]}"


def split_axis(name: str) -> int | None:
    """The axis along which ranks hold slices of a tensor; None where each holds all of it."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith(_SPLIT_COLUMNS) else 0


def open_meta(folder: Path, tokenizer_size: int) -> WeightsFile:
    """Open a folder of any number of shards; `tokenizer_size` is the vocabulary where params.json says -1.

    Raises: UserError for what is not a plain Llama or does not fit together, CorruptFile for a broken file.
    """
    _verify_checklist(folder)
    config = _read_params(folder / PARAMS, tokenizer_size)
    paths = sorted(folder.glob(_SHARDS))
    expected = [f"consolidated.{rank:02d}.pth" for rank in range(len(paths))]
    if not paths or [path.name for path in paths] != expected:
        raise UserError(f"{folder}: weights are {[path.name for path in paths]}, expected consolidated.00.pth, 01, ...")
    shards = [open_torch_file(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        shard.pop(_RECOMPUTED, None)
        if set(shard) != set(shards[0]):
            odd = sorted(set(shard) ^ set(shards[0]))[0]
            raise UserError(f"{path}: does not hold the same tensors as {paths[0].name} (first difference: {odd})")
    found = {name: _merged(paths, name, [shard[name] for shard in shards]) for name in shards[0]}
    parts = layout.match_parts(folder, config, found, meta_name)
    return WeightsFile(config, layout.from_interleaved_parts(config, parts), {})


def save_meta(
    folder: Path, config: ModelConfig, state: Mapping[str, Tensor], *, dtype: torch.dtype, shards: int = 1
) -> None:
    """Write params.json, `shards` weight files and checklist.chk (of every file then in the folder).

    Raises: UserError where the format cannot hold the model or the model cannot be split that often.
    """
    _check_can_save(config, shards)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PARAMS, _params(config))
    for rank in range(shards):
        path = folder / f"consolidated.{rank:02d}.pth"
        with atomic_file(path) as temporary:
            try:
                torch.save(dict(_rank_tensors(config, state, dtype, rank, shards)), temporary)
            except RuntimeError as error:
                raise layout.cannot_write(path, error) from None
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKLIST)
    write_text(folder / CHECKLIST, "".join(f"{_md5(path)}  {path.name}\n" for path in files))


def _rank_tensors(
    config: ModelConfig, state: Mapping[str, Tensor], dtype: torch.dtype, rank: int, shards: int
) -> Iterator[tuple[str, Tensor]]:
    for part, tensor in layout.unfuse_interleaved(config, state):
        name = meta_name(part)
        axis = split_axis(name)
        piece = tensor if axis is None else tensor.chunk(shards, axis)[rank]
        # A clone, because torch.save would write the whole storage behind a view.
        yield name, piece.detach().to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
    if config.tie_embeddings:
        embedding = state[layout.EMBED].chunk(shards, 0)[rank]
        yield _TOP_NAMES[layout.HEAD], embedding.detach().to("cpu", dtype, copy=True)


def _merged(paths: list[Path], name: str, pieces: list[Stored]) -> Stored:
    axis = split_axis(name)
    first = pieces[0]
    if axis is None or len(pieces) == 1:
        return first
    for path, piece in zip(paths, pieces, strict=True):
        if piece.shape != first.shape:
            raise UserError(
                f"{path}: tensor {name} has shape {list(piece.shape)}, in {paths[0].name} it has {list(first.shape)}"
            )
    if axis >= len(first.shape):
        raise UserError(f"{paths[0]}: tensor {name} has shape {list(first.shape)}, expected a matrix")
    shape = list(first.shape)
    shape[axis] *= len(pieces)
    return Stored(tuple(shape), first.dtype, lambda: torch.cat([piece.read() for piece in pieces], axis))


def _read_params(path: Path, tokenizer_size: int) -> ModelConfig:
    read = Fields(path, read_json(path))
    for key in read.values:
        if key not in _KEYS:
            raise UserError(f"{path}: key {key!r} is not one of Llama 2's", f"known: {', '.join(sorted(_KEYS))}")
    if read.boolean("use_scaled_rope", False):
        raise UserError(f"{path}: use_scaled_rope = true does not give its factors", "load the Hugging Face folder")
    dim, n_heads = read.integer("dim"), read.integer("n_heads")
    is_from_tokenizer = read.values.get("vocab_size", -1) == -1
    multiplier = read.number("ffn_dim_multiplier") if read.values.get("ffn_dim_multiplier") is not None else None
    return checked(
        path,
        ModelConfig,
        vocab_size=tokenizer_size if is_from_tokenizer else read.integer("vocab_size"),
        dim=dim,
        n_layers=read.integer("n_layers"),
        n_heads=n_heads,
        n_kv_heads=read.integer("n_kv_heads", n_heads),
        head_dim=dim // n_heads,
        ffn_dim=ffn_width(dim, read.integer("multiple_of"), multiplier),
        max_positions=read.integer("max_seq_len", _MAX_POSITIONS),
        norm_eps=read.number("norm_eps", 1e-5),
        rope_theta=read.number("rope_theta", 10_000.0),
    )


def _check_can_save(config: ModelConfig, shards: int) -> None:
    if config.head_dim * config.n_heads != config.dim or config.rope_scaling is not None:
        raise UserError(
            "Meta's format holds no rope_scaling and no head_dim other than dim / n_heads", "write hf or gguf"
        )
    for name in ("vocab_size", "dim", "n_heads", "n_kv_heads", "ffn_dim"):
        if shards < 1 or getattr(config, name) % shards:
            raise UserError(f"shards = {shards} does not divide the model's {name} = {getattr(config, name)}")
    if config.max_positions != _MAX_POSITIONS:
        say(f"note: params.json cannot give the context ({config.max_positions} tokens); we read {_MAX_POSITIONS}")
    if config.tie_embeddings:
        say("note: Meta's format has no tied embeddings; they are written twice and read back as two matrices")


def _params(config: ModelConfig) -> dict[str, Any]:
    multiple_of, multiplier = _ffn_rule(config.dim, config.ffn_dim)
    params: dict[str, Any] = {
        "dim": config.dim,
        "multiple_of": multiple_of,
        "n_heads": config.n_heads,
        "n_layers": config.n_layers,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
    }
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    if config.n_kv_heads != config.n_heads:
        params["n_kv_heads"] = config.n_kv_heads
    if config.rope_theta != 10_000.0:
        params["rope_theta"] = config.rope_theta
    return params


def _ffn_rule(dim: int, ffn_dim: int) -> tuple[int, float | None]:
    """A `multiple_of` and `ffn_dim_multiplier` that give this width; for released sizes the released ones."""
    base = ffn_width(dim, 1)
    # Half a unit above, so that the rule's rounding down lands on the width itself.
    exact = (ffn_dim + 0.5) / base
    for multiplier in (None, *(round(ffn_dim / base, digits) for digits in (1, 2)), exact):
        for multiple_of in (256, 4096, 1024, 512, 128, 64, 32, 16, 8, 4, 2, 1):
            if ffn_width(dim, multiple_of, multiplier) == ffn_dim:
                return multiple_of, multiplier
    raise AssertionError(f"no rule gives a feed-forward width of {ffn_dim} for dim {dim}")


def _verify_checklist(folder: Path) -> None:
    path = folder / CHECKLIST
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.strip().partition(" ")
        name = name.strip().removeprefix("*")
        if not name:
            continue
        if Path(name).name != name:
            raise UserError(f"{path}: {name!r} is not a file name in the same folder")
        if not (folder / name).exists():
            raise CorruptFile(f"{folder / name}: listed in {CHECKLIST} but missing", "fetch it again")
        if _md5(folder / name) != digest:
            raise CorruptFile(f"{folder / name}: md5 differs from {CHECKLIST}", "fetch it again")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
