"""Files made by torch.save, opened as data: no code in them runs, and tensors stay on disk until they are read."""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from groundup.base.errors import CorruptFile, UserError
from groundup.model.weights.layout import FLOAT_TYPES, Stored


def open_torch_file(path: Path) -> dict[str, Stored]:
    """The tensors of a state dict saved by torch.save, by name.

    Raises: CorruptFile if it cannot be read as tensors alone; UserError if it is not a mapping of names to tensors.
    """
    try:
        # Only the zip format can be mapped; the one before it (torch < 1.6) is read whole by the same safe unpickler.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a broken file makes torch raise nearly anything, assertions and struct.error included
        first_line = str(error).strip().partition("\n")[0]
        raise CorruptFile(
            f"{path}: cannot be read as a file of tensors ({first_line})",
            "fetch it again; a file that needs code to load is refused on purpose",
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a mapping of names to tensors", "is this a file of weights?")
    for name, tensor in state.items():
        if tensor.dtype not in FLOAT_TYPES or tensor.layout != torch.strided:
            raise UserError(
                f"{path}: tensor {name} is of type {tensor.dtype} ({tensor.layout}), not plain floating point"
            )
    return {str(name): _stored(tensor) for name, tensor in state.items()}


def _stored(tensor: Tensor) -> Stored:
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)
