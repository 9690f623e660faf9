"""The vocabulary inside a GGUF file, to and from the formats of `tokenizer.py`."""

import json
from collections.abc import Mapping
from typing import Any

from groundup.base.errors import CorruptFile, UserError
from groundup.text.sentencepiece_model import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, build_model

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
    "gpt-2": _BYTE_LEVEL,
}
"""How byte-level vocabularies cut text before merging, by llama.cpp's names."""


def model_from_gguf(fields: Mapping[str, Any]) -> bytes:
    """A SentencePiece model from the fields of a GGUF file with `tokenizer.ggml.model` "llama"."""
    tokens = _field(fields, "tokens")
    scores = _field(fields, "scores")
    bos_id, eos_id = int(_field(fields, "bos_token_id")), int(_field(fields, "eos_token_id"))
    kinds = [int(kind) for kind in _field(fields, "token_type")]
    if not len(tokens) == len(scores) == len(kinds):
        raise CorruptFile(f"GGUF: {len(tokens)} tokens, {len(scores)} scores and {len(kinds)} token types")
    if not (0 <= bos_id < len(tokens) and 0 <= eos_id < len(tokens)):
        raise CorruptFile(f"GGUF: BOS {bos_id} or EOS {eos_id} lies outside the {len(tokens)} tokens")
    kinds[bos_id] = kinds[eos_id] = CONTROL
    if UNKNOWN not in kinds:
        raise CorruptFile("GGUF: the vocabulary has no unknown token")
    pieces = [Piece(token, float(score), kind) for token, score, kind in zip(tokens, scores, kinds, strict=True)]
    prefix = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    return build_model(pieces, unk_id=kinds.index(UNKNOWN), bos_id=bos_id, eos_id=eos_id, add_dummy_prefix=prefix)


def byte_level_json_from_gguf(fields: Mapping[str, Any]) -> str:
    """A tokenizer.json from the fields of a GGUF file with `tokenizer.ggml.model` "gpt2"."""
    name = fields.get("tokenizer.ggml.pre", "gpt-2")
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"GGUF: pre-tokenizer {name!r} is not known here (known: {', '.join(PRE_TOKENIZERS)})",
            "convert the original Hugging Face folder instead",
        )
    tokens = _field(fields, "tokens")
    special = {CONTROL: True, USER_DEFINED: False}
    added = [
        {
            "id": index, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": special[kind],
        }
        for index, (token, kind) in enumerate(zip(tokens, _field(fields, "token_type"), strict=True))
        if kind in special
    ]  # fmt: skip
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": PRE_TOKENIZERS[name],
        "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in _field(fields, "merges")],
        },
    }  # fmt: skip
    return json.dumps(value, ensure_ascii=False)


def gguf_from_model(proto: Any, bos_id: int, eos_id: int) -> dict[str, Any]:
    """The fields that `model_from_gguf` reads."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.unknown_token_id": next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN),
        "tokenizer.ggml.bos_token_id": bos_id,
        "tokenizer.ggml.eos_token_id": eos_id,
        "tokenizer.ggml.add_space_prefix": bool(proto.normalizer_spec.add_dummy_prefix),
        "tokenizer.ggml.add_bos_token": True,
    }


def gguf_from_json(value: dict[str, Any], bos_id: int, eos_id: int) -> dict[str, Any]:
    """The fields that `byte_level_json_from_gguf` reads."""
    names = [name for name, rule in PRE_TOKENIZERS.items() if _same_cut(rule, value["pre_tokenizer"])]
    if not names:
        raise UserError("this tokenizer's pre-tokenizer has no name in GGUF", "write a Hugging Face folder instead")
    vocab = dict(value["model"]["vocab"])
    kinds = dict.fromkeys(vocab.values(), NORMAL)
    for token in value["added_tokens"]:
        vocab[token["content"]] = token["id"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise UserError("this tokenizer's ids have gaps, which GGUF cannot hold", "write a Hugging Face folder instead")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in value["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": names[0],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds[index] for index in range(len(tokens))],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": bos_id,
        "tokenizer.ggml.eos_token_id": eos_id,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    }


def _same_cut(rule: dict[str, Any], other: Any) -> bool:
    """Whether two pre-tokenizer settings cut text alike; where offsets point does not matter."""
    return bool(_without_offsets(rule) == _without_offsets(other))


def _without_offsets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_offsets(item) for key, item in value.items() if key != "trim_offsets"}
    return [_without_offsets(item) for item in value] if isinstance(value, list) else value


def _field(fields: Mapping[str, Any], name: str) -> Any:
    key = f"tokenizer.ggml.{name}"
    if key not in fields:
        raise CorruptFile(f"GGUF: the file has no {key}")
    return fields[key]
