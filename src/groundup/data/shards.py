"""Token shards: the corpus as memory-mapped arrays of token ids, with document starts.

Layout of a folder: `index.json`, and for each split `SPLIT/NNNN.tokens.npy` (uint16, or uint32 for vocabularies beyond
65,536) and `SPLIT/NNNN.offsets.npy` (int64, where each document of the shard starts). A document is BOS, its text, EOS,
and lies whole in one shard.
"""

import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from groundup.base.errors import CorruptFile, UserError
from groundup.base.files import read_json, sha256_json, write_json
from groundup.base.progress import Progress
from groundup.text.tokenizer import Tokenizer

INDEX = "index.json"
_BLOCK_CHARACTERS = 4_000_000
_PROBE = "The quick brown fox, 1234567 élan \u4f60\u597d \U0001f600\n\tdef f(x): return x**2  # <s> [INST]"
_RUN_AGAIN = "run the shards stage again"


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hex digest of what a tokenizer does, the same whichever file format it was loaded from."""
    # Id 0 is <unk> in SentencePiece, which writes a sign of its own for it where `tokenizers` writes nothing.
    pieces = [tokenizer.token_bytes(token_id).hex() for token_id in range(1, tokenizer.vocab_size)]
    return sha256_json([tokenizer.bos_id, tokenizer.eos_id, pieces, list(tokenizer.encode(_PROBE))])


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type that shards of a vocabulary are kept in."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class ShardInfo:
    """One shard as `index.json` lists it; `text_bytes` is its text in UTF-8, what bits per byte divide by."""

    name: str
    num_tokens: int
    num_documents: int
    text_bytes: int


def write_split(
    texts: Iterable[str], tokenizer: Tokenizer, folder: Path, *, shard_tokens: int, description: str = "tokenize"
) -> list[ShardInfo]:
    """Encode documents into shards of about `shard_tokens` tokens in `folder`, showing tokens/s.

    Why: a shard's .json is written, atomically, once its arrays are whole. A run that was killed goes on after the last
    such shard and ends with the same files, because shards are cut by documents and not by blocks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _finished_shards(folder)
    remaining = itertools.islice(texts, sum(shard.num_documents for shard in shards), None)
    writer: _ShardWriter | None = None
    with Progress(description, None, "tokens", done=sum(shard.num_tokens for shard in shards)) as progress:
        for block in _blocks(remaining):
            for text, ids in zip(block, tokenizer.encode_many(block), strict=True):
                if writer is None:
                    writer = _ShardWriter(folder, len(shards), token_dtype(tokenizer.vocab_size))
                progress.advance(
                    writer.add(ids, tokenizer.bos_id, tokenizer.eos_id, len(text.encode("utf-8", "surrogatepass")))
                )
                if writer.num_tokens >= shard_tokens:
                    shards.append(writer.close())
                    writer = None
        if writer is not None:
            shards.append(writer.close())
    return shards


def _finished_shards(folder: Path) -> list[ShardInfo]:
    shards: list[ShardInfo] = []
    while (path := folder / f"{len(shards):04d}.json").exists():
        shards.append(ShardInfo(**read_json(path)))
    return shards


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts big enough to keep all cores busy and small enough to sit in memory."""
    block: list[str] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= _BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


class _ShardWriter:
    """Streams tokens to disk, so that a shard never has to fit in memory."""

    def __init__(self, folder: Path, number: int, dtype: np.dtype[Any]) -> None:
        self._folder, self._name, self._dtype = folder, f"{number:04d}", dtype
        self._body = (folder / f"{self._name}.body").open("wb")
        self._offsets: list[int] = []
        self.num_tokens = self._text_bytes = 0

    def add(self, ids: NDArray[np.int32], bos_id: int, eos_id: int, text_bytes: int) -> int:
        """Append one document; returns the number of tokens it came to."""
        document = np.empty(len(ids) + 2, dtype=self._dtype)
        document[0], document[1:-1], document[-1] = bos_id, ids, eos_id
        document.tofile(self._body)
        self._offsets.append(self.num_tokens)
        self.num_tokens += len(document)
        self._text_bytes += text_bytes
        return len(document)

    def close(self) -> ShardInfo:
        self._body.close()
        body = Path(self._body.name)
        with (self._folder / f"{self._name}.tokens.npy").open("wb") as file, body.open("rb") as source:
            _write_npy_header(file, self._dtype, self.num_tokens)
            shutil.copyfileobj(source, file, 1 << 22)
            file.flush()
            os.fsync(file.fileno())
        body.unlink()
        with (self._folder / f"{self._name}.offsets.npy").open("wb") as file:
            np.save(file, np.array(self._offsets, dtype=np.int64))
            file.flush()
            os.fsync(file.fileno())
        info = ShardInfo(self._name, self.num_tokens, len(self._offsets), self._text_bytes)
        write_json(self._folder / f"{self._name}.json", asdict(info))
        return info


def _write_npy_header(file: IO[bytes], dtype: np.dtype[Any], length: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, header)


def write_index(folder: Path, tokenizer: Tokenizer, splits: dict[str, list[ShardInfo]]) -> None:
    """Write `index.json`, which makes the shards in `folder` readable."""
    write_json(
        folder / INDEX,
        {
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "splits": {split: [asdict(shard) for shard in shards] for split, shards in splits.items()},
        },
    )


class TokenShards:
    """One split of a shards folder, read as if it were one long array of tokens."""

    def __init__(self, folder: Path, split: str = "train", tokenizer: Tokenizer | None = None) -> None:
        """Open the files without reading them through; `tokenizer` is the one that the model will use.

        Raises: CorruptFile for a shard whose size or type is not what the index says; UserError for another tokenizer.
        """
        index = read_json(folder / INDEX)
        try:
            self.vocab_size, fingerprint = int(index["vocab_size"]), index["tokenizer"]
            splits = {name: [ShardInfo(**shard) for shard in shards] for name, shards in index["splits"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{folder / INDEX}: not an index of token shards ({error!r})", _RUN_AGAIN) from None
        if split not in splits:
            raise UserError(f"{folder}: no split {split!r}; it has {', '.join(splits) or 'none'}")
        if tokenizer is not None:
            _check_tokenizer(folder, self.vocab_size, fingerprint, tokenizer)
        self.folder, self.split, self.shards = folder, split, splits[split]
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self.num_documents = sum(shard.num_documents for shard in self.shards)
        self.text_bytes = sum(shard.text_bytes for shard in self.shards)
        dtype = token_dtype(self.vocab_size)
        self._tokens = [_open(self._path(s, "tokens"), dtype, s.num_tokens) for s in self.shards]
        self._offsets = [_open(self._path(s, "offsets"), np.dtype(np.int64), s.num_documents) for s in self.shards]
        self._first_token = np.cumsum([0, *(shard.num_tokens for shard in self.shards)])
        self._first_document = np.cumsum([0, *(shard.num_documents for shard in self.shards)])

    def _path(self, shard: ShardInfo, part: str) -> Path:
        return self.folder / self.split / f"{shard.name}.{part}.npy"

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards that hold the tokens start..stop-1: (shard number, first and last + 1 position in it)."""
        number = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while number < len(self.shards) and (base := int(self._first_token[number])) < stop:
            yield number, max(start - base, 0), min(stop - base, self.shards[number].num_tokens)
            number += 1

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens start..stop-1; fewer at the end of the corpus."""
        parts = []
        for number, first, last in self._pieces(start, stop):
            part = self._tokens[number][first:last].astype(np.int64)
            if part.size and part.max() >= self.vocab_size:
                path = self._path(self.shards[number], "tokens")
                raise CorruptFile(
                    f"{path}: token id {part.max()} at or after position {first} of a vocabulary of {self.vocab_size}",
                    _RUN_AGAIN,
                )
            parts.append(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def document_ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """The number of the document that each token start..stop-1 belongs to; fewer at the end of the corpus."""
        parts = []
        for number, first, last in self._pieces(start, stop):
            ids = np.searchsorted(self._offsets[number], np.arange(first, last), side="right") - 1
            parts.append(ids + self._first_document[number])
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _check_tokenizer(folder: Path, vocab_size: int, fingerprint: str, tokenizer: Tokenizer) -> None:
    remedy = "use the tokenizer that the shards were made with, or run the shards stage again with this one"
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"{folder}: shards of a vocabulary of {vocab_size}, but the tokenizer has {tokenizer.vocab_size}", remedy
        )
    if tokenizer_fingerprint(tokenizer) != fingerprint:
        raise UserError(f"{folder}: the shards were made with another tokenizer of the same size", remedy)


def _open(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise CorruptFile(f"{path}: missing, though {INDEX} lists it", _RUN_AGAIN) from None
    except (ValueError, EOFError, OSError) as error:
        raise CorruptFile(f"{path}: truncated or not a .npy file ({error})", _RUN_AGAIN) from None
    if array.shape != (length,) or array.dtype != dtype:
        found = f"{array.dtype} of shape {array.shape}"
        raise CorruptFile(f"{path}: {found}, but {INDEX} says {length} of {dtype}", _RUN_AGAIN)
    return array
