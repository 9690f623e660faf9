"""Files made by torch.save, opened as data: no code in them runs, and tensors stay on disk until they are read."""

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from groundup.base.errors import CorruptFile, UserError
from groundup.model.weights.layout import Stored


def open_torch_file(path: Path) -> dict[str, Stored]:
    """The tensors of a state dict saved by torch.save, by name.

    Raises: CorruptFile if it cannot be read as tensors alone; UserError if it is not a mapping of names to tensors.
    """
    try:
        # Only the zip format can be mapped; the one before it (torch < 1.6) is read whole, by the same restricted unpickler.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CorruptFile(
            f"{path}: cannot be read as a file of tensors ({first_line})",
            "fetch it again; a file that needs code to load is refused on purpose",
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a mapping of names to tensors", "is this a file of weights?")
    return {str(name): Stored(tuple(tensor.shape), tensor.dtype, lambda t=tensor: t) for name, tensor in state.items()}
