"""SentencePiece model files: train one, check one, build one out of other formats, and write it as a tokenizer.json."""

import io
import json
import os
import re
import struct
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2

from groundup.base.errors import CorruptFile, UserError
from groundup.base.progress import say

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Piece types of SentencePiece; GGUF files use the same numbers."""

ModelProto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]  # made at import time
_SAMPLED_LINES = 10_000_000
_MAX_LINE_CHARACTERS = 16_000
_ASCII = "".join(map(chr, range(0x21, 0x7F)))
# The trainer drops every line that holds one of these, so lines are cut there instead.
_LINE_BREAKS = re.compile("[\n\0\u2585]+")
_BPE = 2


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry as SentencePiece writes it: spaces are U+2581, a byte is `<0x0A>`."""

    text: str
    score: float
    kind: int


def train_model(texts: Iterable[str], vocab_size: int, folder: Path, seed: int) -> bytes:
    """Train BPE with Llama 2's settings; returns the bytes of a `tokenizer.model`.

    Source: section 2.2 (32k BPE, numbers split into digits, bytes for unknown characters); the other settings are those
    stored in Meta's released model file.
    Choice: of a corpus of more than ten million lines a random sample of that many is used, drawn with `seed` (Meta's
    limit was 200 million). Lines over 16,000 characters are cut at a space where there is one; the trainer would drop
    or refuse them. Printable ASCII is always in the vocabulary, whatever the corpus: chat tags and code need it.
    Raises: UserError for an empty corpus, and for a vocabulary larger or smaller than the corpus allows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix=".train-tokenizer-", dir=folder) as scratch:
        lines = Path(scratch, "lines.txt")
        count = _write_lines(texts, lines)
        if count == 0:
            raise UserError("the tokenizer's training corpus holds no text", "check the source that feeds this stage")
        if count > _SAMPLED_LINES:
            say(f"tokenizer: training on a random sample of {_SAMPLED_LINES:,} of {count:,} lines")
        sentencepiece.set_random_generator_seed(seed & 0xFFFFFFFF)  # it takes 32 bits
        try:
            sentencepiece.SentencePieceTrainer.train(
                input=str(lines), model_writer=buffer, vocab_size=vocab_size, model_type="bpe",
                byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.99995,
                required_chars=_ASCII,
                normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
                unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
                input_sentence_size=_SAMPLED_LINES, shuffle_input_sentence=True,
                max_sentence_length=8 * _MAX_LINE_CHARACTERS, num_threads=max(2, os.cpu_count() or 2), minloglevel=2,
            )  # fmt: skip
        except RuntimeError as error:
            raise _vocabulary_error(vocab_size, str(error)) from error
    proto = ModelProto.FromString(buffer.getvalue())
    # Names of temporary files and of this machine's cores would make equal tokenizers differ in their bytes.
    for field in ("input", "model_prefix", "num_threads"):
        proto.trainer_spec.ClearField(field)
    return bytes(proto.SerializeToString(deterministic=True))


def _write_lines(texts: Iterable[str], path: Path) -> int:
    count = 0
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        for text in texts:
            for line in _LINE_BREAKS.split(text):
                for part in _cut(line):
                    file.write(part + "\n")
                    count += 1
    return count


def _cut(line: str) -> Iterable[str]:
    while len(line) > _MAX_LINE_CHARACTERS:
        space = line.rfind(" ", 1, _MAX_LINE_CHARACTERS)
        end = space if space > 0 else _MAX_LINE_CHARACTERS
        yield line[:end]
        # The trainer puts a space before every line, so the one we cut at is not lost.
        line = line[end + 1 :] if space > 0 else line[end:]
    if line:
        yield line


def _vocabulary_error(vocab_size: int, message: str) -> UserError:
    if found := re.search(r"value <= (\d+)", message):
        largest = int(found[1])
        return UserError(
            f"vocab_size {vocab_size}: this corpus supports at most {largest} pieces",
            f"set vocab_size to {largest} or less, or train the tokenizer on more text",
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size {vocab_size}: the 259 control and byte pieces and this corpus's characters need {found[1]}",
            f"set vocab_size to {found[1]} or more",
        )
    return UserError(f"sentencepiece could not train a vocabulary of {vocab_size}: {message}")


def parse_model(data: bytes, name: str) -> Any:
    """The checked protobuf of a `tokenizer.model`; `name` is what messages call it.

    Raises: CorruptFile when the bytes are no SentencePiece model, UserError when it is not BPE or lacks BOS or EOS.
    """
    try:
        proto = ModelProto.FromString(data)
    except DecodeError as error:
        raise CorruptFile(f"{name}: not a SentencePiece model ({error})") from None
    if not proto.pieces:
        raise CorruptFile(f"{name}: a SentencePiece model without pieces")
    if proto.trainer_spec.model_type != _BPE:
        raise UserError(f"{name}: a SentencePiece model that is not BPE; Llama-family models use BPE")
    control = {piece.piece for piece in proto.pieces if piece.type == CONTROL}
    for role, piece in (("BOS", proto.trainer_spec.bos_piece), ("EOS", proto.trainer_spec.eos_piece)):
        if piece not in control:
            raise UserError(f"{name}: the vocabulary has no {role} piece {piece!r}")
    return proto


def build_model(
    pieces: Sequence[Piece], *, unk_id: int, bos_id: int, eos_id: int, add_dummy_prefix: bool = True
) -> bytes:
    """The bytes of a `tokenizer.model` with this vocabulary and Llama's normaliser."""
    proto = ModelProto()
    for piece in pieces:
        proto.pieces.add(piece=piece.text, score=piece.score, type=piece.kind)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback, spec.split_digits = _BPE, len(pieces), True, True
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = unk_id, bos_id, eos_id, -1
    spec.unk_piece, spec.bos_piece, spec.eos_piece = (pieces[index].text for index in (unk_id, bos_id, eos_id))
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    return bytes(proto.SerializeToString(deterministic=True))


def model_from_llama2c(path: Path) -> bytes:
    """A llama2.c tokenizer file (`tok512.bin`) as a SentencePiece model.

    The file is int32 longest piece, then for each piece float32 score, int32 length and its bytes, spaces as they are.
    """
    data = path.read_bytes()
    pieces: list[Piece] = []
    offset = 4
    try:
        while offset < len(data):
            score, length = struct.unpack_from("<fi", data, offset)
            offset += 8
            if not 0 <= length <= len(data) - offset:
                raise ValueError(f"piece {len(pieces)} has length {length}")
            text = data[offset : offset + length].decode("utf-8")
            offset += length
            pieces.append(_llama2c_piece(len(pieces), text, score))
        if len(pieces) < 259:
            raise ValueError(f"only {len(pieces)} pieces")
    except (struct.error, ValueError) as error:
        raise CorruptFile(f"{path}: not a llama2.c tokenizer ({error})") from None
    return build_model(pieces, unk_id=0, bos_id=1, eos_id=2)


def _llama2c_piece(index: int, text: str, score: float) -> Piece:
    if index < 3:  # llama2.c writes these three for display, with line breaks around them
        return Piece(("<unk>", "<s>", "</s>")[index], 0.0, UNKNOWN if index == 0 else CONTROL)
    if index < 259:
        return Piece(f"<0x{index - 3:02X}>", score, BYTE)
    return Piece(text.replace(" ", SPACE), score, NORMAL)


def piece_bytes(proto: Any) -> list[bytes]:
    """What each id adds to the decoded text; nothing for control pieces."""
    table = []
    for piece in proto.pieces:
        if piece.type == BYTE:
            table.append(bytes([int(piece.piece[3:5], 16)]))
        elif piece.type == CONTROL:
            table.append(b"")
        elif piece.type == UNKNOWN:
            table.append(proto.trainer_spec.unk_surface.encode())
        else:
            table.append(piece.piece.replace(SPACE, " ").encode())
    return table


def merges_are_equivalent(proto: Any) -> bool:
    """Whether ranked merges give SentencePiece's ids: no piece is matched outside BPE, and scores order the pieces.

    Why: SentencePiece merges whatever pair forms the best-scored piece; a tokenizer.json lists the pairs by rank. They
    agree when every character of a piece is a piece itself and no two pieces tie, except for the runs of spaces that
    Meta appended to its vocabulary with one and the same score.
    """
    spec = proto.normalizer_spec
    if spec.remove_extra_whitespaces or spec.precompiled_charsmap or not spec.escape_whitespaces:
        return False
    if any(piece.type in (USER_DEFINED, UNUSED) for piece in proto.pieces):
        return False
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    if not {character for piece in ids for character in piece} <= ids.keys():
        return False
    tied: dict[float, list[str]] = {}
    for piece, index in ids.items():
        if len(piece) > 1:
            tied.setdefault(proto.pieces[index].score, []).append(piece)
    return all(len(pieces) == 1 or _grow_one_by_one(pieces, ids) for pieces in tied.values())


def _grow_one_by_one(pieces: list[str], ids: dict[str, int]) -> bool:
    """Whether tied pieces are the runs of one character of all lengths up to some limit, ranked before that character.

    Why: both algorithms then grow the leftmost run one character at a time.
    """
    characters = {character for piece in pieces for character in piece}
    if len(characters) != 1 or sorted(map(len, pieces)) != list(range(2, len(pieces) + 2)):
        return False
    return max(ids[piece] for piece in pieces) < ids[characters.pop()]


def tokenizer_json(proto: Any) -> str:
    """The same tokenizer in the `tokenizers` library's format.

    Why: the normaliser prepends and replaces the space, and there is no pre-tokeniser. The Metaspace pre-tokeniser that
    converters write gives other ids for leading spaces.
    """
    added = [
        {
            "id": index, "content": piece.piece, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": piece.type != USER_DEFINED,
        }
        for index, piece in enumerate(proto.pieces)
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    ]  # fmt: skip
    unk = next((piece.piece for piece in proto.pieces if piece.type == UNKNOWN), None)
    bos = proto.trainer_spec.bos_piece
    bos_id = next(index for index, piece in enumerate(proto.pieces) if piece.piece == bos)
    prefixed = proto.normalizer_spec.add_dummy_prefix
    spaces_to_text: dict[str, Any] = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = [{"type": "Prepend", "prepend": SPACE}] if prefixed else []
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": index}} for index, name in enumerate("AB"))
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, replace]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first],
            "pair": [start, first, {"SpecialToken": {"id": bos, "type_id": 1}}, second],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [spaces_to_text, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
            "merges": _merges(proto),
        },
    }  # fmt: skip
    return json.dumps(value, ensure_ascii=False)


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every pair of pieces that forms a piece, best score first."""
    normal = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    ranked = []
    for text, index in normal.items():
        score = proto.pieces[index].score
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal:
                ranked.append((-score, normal[left], normal[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
