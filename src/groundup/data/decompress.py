"""Bytes out of plain, gzip and zstd files, with limits: a small file must not fill the memory or the disk."""

import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import zstandard

from groundup.base.errors import CorruptFile, UserError

_CHUNK_BYTES = {"": 1 << 20, ".gz": 1 << 15, ".zst": 1 << 10}
"""Compressed bytes taken at once. Why: 1 KiB of zstd can stand for 32 MiB, 32 KiB of gzip for as much."""
_RATIO_COUNTS_FROM_BYTES = 16 << 20


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes) -> bytes: ...


class DecompressedFile(io.RawIOBase):
    """A file as a stream of its content; `bytes_read` counts what was taken from the disk, for progress.

    Raises: `CorruptFile` when the compressed data is damaged or ends early, `UserError` when it grows beyond
    `max_ratio` times its size (counted from 16 MiB on) or beyond `max_bytes`.
    """

    def __init__(self, path: Path, max_ratio: float, max_bytes: int) -> None:
        super().__init__()
        self.bytes_read = 0
        self._path, self._max_ratio, self._max_bytes = path, max_ratio, max_bytes
        self._chunks = self._limited(_decompressed(path, self._raw_chunks()))
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # its caller gives a memoryview
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def _raw_chunks(self) -> Iterator[bytes]:
        size = _CHUNK_BYTES.get(self._path.suffix.lower(), _CHUNK_BYTES[""])
        try:
            with self._path.open("rb") as file:
                while chunk := file.read(size):
                    self.bytes_read += len(chunk)
                    yield chunk
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror})") from None

    def _limited(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        total = 0
        for chunk in chunks:
            total += len(chunk)
            if total > self._max_bytes:
                raise UserError(
                    f"{self._path}: more than {self._max_bytes} bytes after decompression",
                    "if that is meant, raise read.max_decompressed_bytes",
                )
            if total > _RATIO_COUNTS_FROM_BYTES and total > self._max_ratio * self.bytes_read:
                raise UserError(
                    f"{self._path}: grows to more than {self._max_ratio:g} times its size (a decompression bomb?)",
                    "if that is meant, raise read.max_ratio",
                )
            yield chunk


def _decompressed(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    start = _STARTERS.get(path.suffix.lower())
    if start is None:
        yield from chunks
        return
    decompressor, fed = start(), False
    for chunk in chunks:
        data = chunk
        while data:
            if decompressor.eof:  # files may hold several members or frames, one after another
                data = data.lstrip(b"\0") if path.suffix.lower() == ".gz" else data
                decompressor, fed = start(), False
                if not data:
                    break
            try:
                content = decompressor.decompress(data)
            except (zlib.error, zstandard.ZstdError) as error:
                raise CorruptFile(f"{path}: damaged {path.suffix[1:]} data ({error})") from None
            fed = True
            data = decompressor.unused_data if decompressor.eof else b""
            yield content
    if fed and not decompressor.eof:
        raise CorruptFile(f"{path}: ends in the middle of its {path.suffix[1:]} data", "is the download complete?")


_STARTERS: dict[str, Callable[[], _Decompressor]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(),
}
