"""`step.c`, compiled for this machine's CPU when it is first needed.

Why: between the matrix products of a decoding step stand dozens of small operations, and calling each through torch
costs more than computing it. Without a C compiler, or with GROUNDUP_NATIVE=0, the engine does the same in torch.
"""

import ctypes
import functools
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from groundup.base.files import cache_folder, sha256_json
from groundup.model.config import ModelConfig
from groundup.model.transformer import RMSNorm

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("step.c")
FLAGS = (
    "-std=c11", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC",
)  # fmt: skip
LANES = 16
MAX_HEAD_DIM = 256
MAX_QUERY_HEADS = 64
"""As in `step.c`."""


class StepKernels:
    """The functions of `step.c` for one dtype of activations; all tensors lie on the CPU and are dense.

    Shape letters: B sequences, D width, F FFN width, H query heads, G key/value heads, K channels per head.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._threads = torch.get_num_threads()
        pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        self._add_rms_norm = library.add_rms_norm
        self._add_rms_norm.argtypes = [*[pointer] * 4, number, number, ctypes.c_float, threads]
        self._silu_mul = library.silu_mul
        self._silu_mul.argtypes = [pointer, pointer, number, number, threads]
        self._quantize_rows = library.quantize_rows
        self._quantize_rows.argtypes = [*[pointer] * 3, number, number, threads]
        self._attend = library.attend
        self._attend.argtypes = [*[pointer] * 7, *[number] * 5, threads]

    def add_rms_norm(self, x: Tensor, addend: Tensor | None, norm: RMSNorm) -> Tensor:
        """x += addend, then norm(x). Shapes: x (B, D) float32, changed in place; addend (B, D) -> (B, D)."""
        B, D = x.shape
        assert x.dtype == torch.float32, x.dtype
        assert addend is None or addend.dtype == self.dtype, (addend.dtype, self.dtype)
        assert norm.weight.dtype == self.dtype, (norm.weight.dtype, self.dtype)
        out = torch.empty(B, D, dtype=self.dtype)
        added = None if addend is None else addend.data_ptr()
        gain = norm.weight.data_ptr()
        self._add_rms_norm(x.data_ptr(), added, gain, out.data_ptr(), B, D, norm.eps, self._threads)
        return out

    def silu_mul(self, gates_and_ups: Tensor) -> Tensor:
        """silu(gate) * up. Shapes: (B, 2F) -> (B, F)."""
        B, F = gates_and_ups.shape[0], gates_and_ups.shape[1] // 2
        assert gates_and_ups.dtype == self.dtype, (gates_and_ups.dtype, self.dtype)
        out = torch.empty(B, F, dtype=self.dtype)
        self._silu_mul(gates_and_ups.data_ptr(), out.data_ptr(), B, F, self._threads)
        return out

    def quantize_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x = (codes - 128) * largest / 127. Shapes: (B, D) float32 -> (B, D) uint8, (B, 1) float32."""
        B, D = x.shape
        assert x.dtype == torch.float32, x.dtype
        assert x.is_contiguous()
        codes, largest = torch.empty(B, D, dtype=torch.uint8), torch.empty(B, 1)
        self._quantize_rows(x.data_ptr(), codes.data_ptr(), largest.data_ptr(), B, D, self._threads)
        return codes, largest

    def attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Attention of one new token per sequence; its key and value are turned and stored on the way.

        Shapes: qkv (B, (H+2G)*K); cos, sin (B, K/2) float32; keys, values (slots, G, S, K), sequence b in slot b;
        positions (B,) int64 -> (B, H*K).
        """
        B, (_, G, S, K) = len(qkv), keys.shape
        assert keys.dtype == values.dtype == qkv.dtype == self.dtype, (keys.dtype, qkv.dtype, self.dtype)
        H = qkv.shape[1] // K - 2 * G
        out = torch.empty(B, H * K, dtype=self.dtype)
        self._attend(
            qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.data_ptr(), values.data_ptr(), positions.data_ptr(),
            out.data_ptr(), B, H, G, K, S, self._threads,
        )  # fmt: skip
        return out


def step_kernels(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> StepKernels | None:
    """The kernels for such a model, None where they are not to be had."""
    fits = config.head_dim % LANES == 0 and config.head_dim <= MAX_HEAD_DIM
    fits = fits and config.n_heads // config.n_kv_heads <= MAX_QUERY_HEADS
    return load_kernels(dtype) if fits and device.type == "cpu" else None


def load_kernels(dtype: torch.dtype) -> StepKernels | None:
    """The kernels for activations of this dtype, None where they are not to be had."""
    library = _load_library(dtype) if dtype in (torch.float32, torch.bfloat16) else None
    return None if library is None else StepKernels(library, dtype)


@functools.cache
def _load_library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled file, from the cache if it was compiled for this CPU before; None, with a log line, if it cannot be
    compiled here."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if os.environ.get("GROUNDUP_NATIVE") == "0" or compiler is None:
        logger.info("decoding without compiled kernels: %s", "no C compiler" if compiler is None else "switched off")
        return None
    flags = [*FLAGS, *(["-DBF16"] if dtype == torch.bfloat16 else [])]
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=False, timeout=60
        ).stdout
        key = sha256_json([SOURCE.read_text(encoding="utf-8"), flags, version, _cpu()])
        path = cache_folder() / "kernels" / f"step-{key[:16]}.so"
        if not path.exists():
            _compile([compiler, *flags], path)
        if path.stat().st_uid != os.getuid():
            raise OSError(f"{path} belongs to somebody else")
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("decoding without compiled kernels, which is slower: %s", error)
        return None


def _compile(command: list[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(built), "-lm"], capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode:
            raise OSError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
        built.replace(path)


def _cpu() -> str:
    """What decides whether code compiled here runs there: a home folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {platform.system()} {flags}"
