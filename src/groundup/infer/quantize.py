"""Weights in the forms that torch's kernels decode fastest from.

A prepared model is a second `Transformer` whose linear layers are replaced and whose embeddings are shared; training
never sees it. Measured on two Zen 4 cores at 32 rows: packed bf16 runs at twice the speed of torch's plain bf16 linear,
int8 at 1.5 times that of packed bf16.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from groundup.base.errors import UserError
from groundup.infer.kernels.native import load_kernels
from groundup.model.transformer import Block, RMSNorm, Transformer
from groundup.train.loop import choose_precision

Weights = Literal["as is", "fp32", "bf16", "int8", "int4"]
WEIGHTS: tuple[Weights, ...] = ("as is", "fp32", "bf16", "int8", "int4")
SamplingWeights = Literal["auto", "as is", "fp32", "bf16", "int8", "int4"]
INT4_GROUP = 32
PACKED_ROWS = 32
"""The number of rows that packed layouts are chosen for; other numbers work too."""


def sampling_weights(wanted: SamplingWeights, device: torch.device) -> Weights:
    """`auto`: bf16 where the device multiplies bf16 matrices in hardware, else as they are."""
    if wanted != "auto":
        return wanted
    return "bf16" if choose_precision("auto", device) == "bf16" else "as is"


@dataclass(frozen=True)
class Prepared:
    """A model to generate with: `head` maps hidden states to logits."""

    model: Transformer
    head: nn.Module
    weight_bytes: int
    """Memory of all weights; what is shared with the source model is counted too."""


class PackedLinear(nn.Module):
    """x @ weight.T with the weight laid out once for oneDNN, in fp32 or bf16.

    Why: `F.linear` lays the weight out anew in every call, which at 32 rows takes longer than the product.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_bytes = weight.nbytes
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        return out


class Int8Linear(nn.Module):
    """x @ weight.T with int8 weights (a scale for each output) and int8 activations (a scale for each row).

    Why: scales per row, not per tensor, so that an answer does not depend on its batch neighbours; the integer product
    itself is exact.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rounded, scales = quantize_int8(weight)
        self.num_bytes = rounded.nbytes + scales.nbytes
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, [PACKED_ROWS, weight.shape[1]])
        self.scales = scales
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.middle = torch.tensor(128.5)
        self.kernels = load_kernels(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self.kernels is not None:
            codes, largest = self.kernels.quantize_rows(rows)
        else:
            largest = rows.abs().amax(-1, keepdim=True).clamp_(min=1e-12)  # (rows, 1)
            codes = torch.add(self.middle, rows / largest, alpha=127).to(torch.uint8)  # truncation after + 0.5 rounds
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1 / 127, 128, self.packed, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out.mul_(largest).view(*x.shape[:-1], -1)


class Int4Linear(nn.Module):
    """x @ weight.T with 4-bit weights in groups of 32 inputs and bf16 activations."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        codes, scales_and_offsets = quantize_int4(weight, INT4_GROUP)
        self.packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales_and_offsets = scales_and_offsets.to(torch.bfloat16)
        self.num_bytes = self.packed.nbytes + self.scales_and_offsets.nbytes

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch._weight_int4pack_mm_for_cpu(rows, self.packed, INT4_GROUP, self.scales_and_offsets)
        return out.view(*x.shape[:-1], -1)


class _CastEmbedding(nn.Module):
    """The source model's embedding, its rows cast after the look-up; the table is not copied."""

    def __init__(self, embed: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = embed.weight
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).to(self.dtype)


class _SharedHead(nn.Module):
    """The source model's own logits."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)


def weights_form(name: str) -> Weights:
    """A form of weights by its name; an unknown one is a `UserError`."""
    for form in WEIGHTS:
        if form == name:
            return form
    raise UserError(f"weights = {name!r} is not known", f"one of: {', '.join(WEIGHTS)}")


def prepare(model: Transformer, weights: Weights) -> Prepared:
    """The model with its linear layers, the head included, in the form `weights`; "as is" is the model itself.

    Raises: UserError for an unknown form, and for one that this device has no kernel for.
    """
    weights = weights_form(weights)
    device = model.embed.weight.device
    if weights == "as is":
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        return Prepared(model, _SharedHead(model), weight_bytes)
    if weights in ("int8", "int4") and device.type != "cpu":
        raise UserError(f"weights = {weights!r} runs on the CPU only, and the model is on {device}", "use 'bf16'")
    # int8 products return fp32, so that the residual stream stays fp32 as well; the 4-bit kernel is fast in bf16 only.
    dtype = torch.float32 if weights in ("fp32", "int8") else torch.bfloat16
    with torch.device("meta"), torch.no_grad():
        twin = Transformer(model.config)
    with torch.no_grad():
        twin.embed = _CastEmbedding(model.embed, dtype)  # type: ignore[assignment]
        twin.norm = _cast_norm(model.norm, dtype)
        twin.head = None
        for new, old in zip(twin.blocks, model.blocks, strict=True):
            assert isinstance(new, Block)
            assert isinstance(old, Block)
            new.attention_norm, new.ffn_norm = _cast_norm(old.attention_norm, dtype), _cast_norm(old.ffn_norm, dtype)
            for new_part, old_part, name in (
                (new.attention, old.attention, "wqkv"), (new.attention, old.attention, "wo"),
                (new.ffn, old.ffn, "w13"), (new.ffn, old.ffn, "w2"),
            ):  # fmt: skip
                setattr(new_part, name, make_linear(getattr(old_part, name).weight.detach(), weights))
        head = make_linear(model.head_weight.detach(), weights)
    layers = [*twin.modules(), head]
    linear_bytes = sum(layer.num_bytes for layer in layers if isinstance(layer, PackedLinear | Int8Linear | Int4Linear))
    plain_bytes = sum(p.nbytes for part in (twin, head) for p in part.parameters())
    return Prepared(twin.eval(), head, linear_bytes + plain_bytes)


def make_linear(weight: Tensor, weights: Weights) -> nn.Module:
    """A linear layer without bias in the form `weights`. Shapes: weight (out, in).

    Choice: the 4-bit kernel needs inputs in whole groups and outputs in multiples of 16; other layers become int8's
    neighbour in precision, packed bf16, which costs memory but no accuracy.
    """
    if weights == "int8":
        return Int8Linear(weight)
    if weights == "int4" and weight.shape[1] % INT4_GROUP == 0 and weight.shape[0] % 16 == 0:
        return Int4Linear(weight)
    dense = weight.to(torch.float32 if weights == "fp32" else torch.bfloat16)
    if dense.device.type == "cpu" and _has_packed_kernel(dense.dtype):
        return PackedLinear(dense)
    linear = nn.Linear(dense.shape[1], dense.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(dense, requires_grad=False)
    return linear


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric rounding, one scale for each output.

    Shapes: weight (out, in) -> codes (out, in) int8, scales (out,) float32; weight = codes * scale.
    Source: s = max|w| / 127, q = round(w / s).
    """
    wide = weight.float()
    scales = wide.abs().amax(1).div(127).clamp(min=1e-12)
    return wide.div(scales[:, None]).round().to(torch.int8), scales


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Affine rounding to 0..15 in groups of inputs.

    Shapes: weight (out, in) -> codes (out, in) int32, (in / group, out, 2) float32: scale and offset;
    weight = (codes - 8) * scale + offset.
    """
    grouped = weight.float().view(len(weight), -1, group)  # (out, groups, group)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-12)
    # The kernel reads both in bf16: round them first, so that the codes are right for what it reads.
    scale = scale.bfloat16().float()
    offset = (low + 8 * scale).bfloat16().float()
    codes = ((grouped - offset) / scale + 8).round().clamp(0, 15).int().flatten(1)
    return codes, torch.cat((scale, offset), -1).transpose(0, 1).contiguous()


def _cast_norm(norm: RMSNorm, dtype: torch.dtype) -> RMSNorm:
    cast = RMSNorm(len(norm.weight), norm.eps)
    cast.weight = nn.Parameter(norm.weight.detach().to(dtype), requires_grad=False)
    return cast


def _has_packed_kernel(dtype: torch.dtype) -> bool:
    if not torch._C._has_mkldnn:
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
