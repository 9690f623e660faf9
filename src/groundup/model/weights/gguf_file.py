"""The container of a GGUF file: typed fields and the places of tensors, every size checked against the file.

Why: the gguf package's reader makes an array object for each number and string (seconds for a large vocabulary) and
follows counts that a broken file makes up; here nothing is read or reserved beyond the end of the file. The package's
tables of types and its dequantisation are used.
Source: the GGUF specification, versions 2 and 3.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from groundup.base.errors import CorruptFile, UserError
from groundup.model.weights.layout import Stored

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_MAX_NAME_BYTES = 65_535
_ROW_BLOCKS = 512
_SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4", GGUFValueType.FLOAT64: "<f8", GGUFValueType.BOOL: "?",
}  # fmt: skip
_FLOATS = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
_QUANTISED = {
    GGMLQuantizationType[name]
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
}


@dataclass(frozen=True)
class GgufFile:
    """Metadata by key (numbers, strings, booleans and lists of them) and tensors by name, in our order of axes."""

    fields: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf_file(path: Path) -> GgufFile:
    """Parse a GGUF file; tensors stay on disk until they are read.

    Raises: CorruptFile if it is truncated or inconsistent, UserError for an unsupported version or tensor type.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise CorruptFile(f"{path}: not a GGUF file (it does not begin with {_MAGIC.decode()})")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data, len(_MAGIC))
    version = cursor.number("<I")
    if version not in _VERSIONS:
        raise UserError(f"{path}: GGUF version {version} is not supported", "convert it again with a current llama.cpp")
    num_tensors, num_fields = cursor.number("<Q"), cursor.number("<Q")
    fields: dict[str, Any] = {}
    for _ in range(num_fields):
        key = cursor.string(_MAX_NAME_BYTES)
        if key in fields:
            raise CorruptFile(f"{path}: key {key!r} appears twice")
        fields[key] = cursor.value(cursor.number("<I"))
    infos: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(num_tensors):
        name = cursor.string(_MAX_NAME_BYTES)
        if name in infos:
            raise CorruptFile(f"{path}: tensor {name!r} appears twice")
        num_dimensions = cursor.number("<I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise CorruptFile(f"{path}: tensor {name!r} has {num_dimensions} dimensions")
        sizes = [cursor.number("<Q") for _ in range(num_dimensions)]
        infos[name] = (sizes, cursor.number("<I"), cursor.number("<Q"))
    alignment = fields.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CorruptFile(f"{path}: general.alignment = {alignment!r} is not a power of two")
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(fields, {name: _stored(path, data, name, start, *info) for name, info in infos.items()})


def _stored(path: Path, data: mmap.mmap, name: str, start: int, sizes: list[int], kind: int, offset: int) -> Stored:
    try:
        quantisation = GGMLQuantizationType(kind)
    except ValueError:
        raise UserError(f"{path}: tensor {name!r} has unknown type {kind}", "update the gguf package") from None
    if quantisation not in _FLOATS and quantisation not in _QUANTISED:
        known = ", ".join(sorted(item.name for item in {*_FLOATS, *_QUANTISED}))
        raise UserError(f"{path}: tensor {name!r} has type {quantisation.name}", f"supported: {known}")
    block_values, block_bytes = GGML_QUANT_SIZES[quantisation]
    row = sizes[0] if sizes else 1
    if row % block_values:
        raise CorruptFile(f"{path}: tensor {name!r}: rows of {row} values do not fill blocks of {block_values}")
    num_bytes = math.prod(sizes) // block_values * block_bytes
    if start + offset + num_bytes > len(data):
        raise CorruptFile(
            f"{path}: tensor {name!r} ends at byte {start + offset + num_bytes}, the file at {len(data)}",
            "fetch it again",
        )
    shape = tuple(reversed(sizes))
    read = partial(_read, data, start + offset, num_bytes, shape, quantisation)
    return Stored(shape, _FLOATS.get(quantisation, torch.float32), read)


def _read(
    data: mmap.mmap, start: int, num_bytes: int, shape: tuple[int, ...], quantisation: GGMLQuantizationType
) -> Tensor:
    raw = np.frombuffer(data, np.uint8, num_bytes, start)
    if quantisation in _FLOATS:
        return torch.from_numpy(raw.copy()).view(_FLOATS[quantisation]).view(shape)
    # Blocks stand alone and the package works on 16 rows at a time, so rows longer than the tensor's are faster.
    block_bytes = GGML_QUANT_SIZES[quantisation][1]
    row_bytes = math.gcd(num_bytes // block_bytes, _ROW_BLOCKS) * block_bytes
    return torch.from_numpy(dequantize(raw.reshape(-1, row_bytes), quantisation)).view(shape)


class _Cursor:
    """Reads values one after the other and never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, at: int) -> None:
        self.path, self.data, self.at = path, data, at

    def take(self, num_bytes: int) -> int:
        """Step over `num_bytes` and return where they begin."""
        start = self.at
        if num_bytes > len(self.data) - start:
            raise CorruptFile(
                f"{self.path}: ends at byte {len(self.data)}, inside a value of {num_bytes} bytes at byte {start}",
                "fetch it again",
            )
        self.at += num_bytes
        return start

    def number(self, code: Literal["<I", "<Q"]) -> int:
        return int(struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0])

    def string(self, max_bytes: int | None = None) -> str:
        length = self.number("<Q")
        if max_bytes is not None and length > max_bytes:
            raise CorruptFile(f"{self.path}: a name of {length} bytes at byte {self.at}")
        start = self.take(length)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise CorruptFile(f"{self.path}: text at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind == GGUFValueType.ARRAY:
            item_kind, length = self.number("<I"), self.number("<Q")
            if item_kind == GGUFValueType.STRING:
                return [self.string() for _ in range(length)]
            return self.numbers(item_kind, length).tolist()
        return self.numbers(kind, 1).tolist()[0]

    def numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = next((dtype for known, dtype in _SCALARS.items() if known == kind), None)
        if dtype is None:
            raise CorruptFile(f"{self.path}: unknown value type {kind} at byte {self.at}")
        start = self.take(count * np.dtype(dtype).itemsize)
        return np.frombuffer(self.data, dtype, count, start)
