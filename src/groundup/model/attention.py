"""Causal attention inside documents, in the form that is fastest where it runs.

Shape letters: B sequences, T tokens, S cached positions, H query heads, G key/value heads, K channels per head.
Query head h reads key/value head h // (H / G). Scores are scaled by 1/sqrt(K).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Documents = Tensor | BlockMask | None
"""Document ids (B, T), what `prepare_documents` made of them, or None: one document per sequence."""

QUERY_BLOCK_TOKENS = 128
MAX_KEPT_TOKENS = 1024
"""Up to this length attention's shares are kept for the backward pass; beyond it they would fill the memory, and are
computed again."""


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Each token's mixture of the values at and before it in its own document.

    Shapes: q (B, T, H, K); k, v (B, T, G, K) -> (B, T, H, K).
    """
    if isinstance(documents, BlockMask):
        return flex_attend(q, k, v, documents)
    if q.device.type == "cpu" and torch.is_grad_enabled():
        return block_causal_attend(q, k, v, documents)
    return sdpa_attend(q, k, v, documents)


def prepare_documents(document_ids: Tensor | None, is_compiled: bool) -> Documents:
    """What `attend` shall be given for all layers of one forward.

    Why: on CUDA, FlexAttention skips whole blocks of other documents, but only its compiled form is fast.
    """
    if document_ids is None or not is_compiled or document_ids.device.type != "cuda":
        return document_ids
    return document_blocks(document_ids)


def is_same_document_before(document_ids: Tensor) -> Tensor:
    """Which tokens each token sees. Shapes: (B, T) -> (B, 1, T, T) bool."""
    T = document_ids.shape[1]
    is_before = torch.ones(T, T, dtype=torch.bool, device=document_ids.device).tril()
    return (document_ids[:, None, :, None] == document_ids[:, None, None, :]) & is_before


def sdpa_attend(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
    """`attend` by torch's own kernel: flash attention unless documents need an explicit mask."""
    is_visible = None if document_ids is None else is_same_document_before(document_ids)
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=is_visible, is_causal=is_visible is None, enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)  # fmt: skip


def document_blocks(document_ids: Tensor) -> BlockMask:
    """The same visibility as `is_same_document_before`, as FlexAttention's sparse blocks."""
    B, T = document_ids.shape

    def is_visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[b, query] == document_ids[b, key])

    return create_block_mask(is_visible, B, None, T, T, device=document_ids.device.type)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """`attend` by FlexAttention; to be called inside compiled code."""
    out = flex_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        block_mask=blocks, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.transpose(1, 2)


def block_causal_attend(
    q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, block_tokens: int = QUERY_BLOCK_TOKENS
) -> Tensor:
    """`attend` as matrix products, a block of queries against the keys up to its end at a time.

    Why: on CPUs torch's flash kernel gains nothing from bf16, while these products run on the bf16 units; most of the
    square above the diagonal is never computed. The query heads of a group are rows of one product, so that keys and
    values are not repeated.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    queries = (q * K**-0.5).view(B, T, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(B * G, H // G, T, K)
    keys, values = (x.transpose(1, 2).reshape(B * G, T, K) for x in (k, v))
    if document_ids is not None:
        document_ids = document_ids.to(torch.int32).repeat_interleave(G, 0)  # (B*G, T)
    out: Tensor = _BlockCausal.apply(queries, keys, values, document_ids, block_tokens)  # type: ignore[no-untyped-call]
    return out.view(B, G, H // G, T, K).permute(0, 3, 1, 2, 4).reshape(B, T, H, K)


class _BlockCausal(torch.autograd.Function):
    """Shapes: q (N, R, T, K) scaled; k, v (N, T, K); document_ids (N, T) -> (N, R, T, K), for N = B*G and R = H/G.

    Why: the derivative by hand keeps exp(scores) in the dtype of the products, and never as float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, block_tokens: int) -> Tensor:
        N, R, T, K = q.shape
        outs, kept = [], []
        for start in range(0, T, block_tokens):
            end = min(start + block_tokens, T)
            shares, total = _shares(q, k, document_ids, start, end)
            mixed = torch.bmm(shares, v[:, :end])
            outs.append((mixed / total).to(q.dtype).view(N, R, end - start, K))  # (N, R, t, K)
            if T <= MAX_KEPT_TOKENS:
                kept += [shares, total]
        out = torch.cat(outs, 2)
        ctx.block_tokens = block_tokens
        ctx.save_for_backward(q, k, v, out, document_ids, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, document_ids, *kept = ctx.saved_tensors
        N, R, T, K = q.shape
        query_gradients = []
        key_gradient, value_gradient = (torch.zeros_like(x, dtype=_wide(x.dtype)) for x in (k, v))
        for index, start in enumerate(range(0, T, ctx.block_tokens)):
            end = min(start + ctx.block_tokens, T)
            shares, total = kept[2 * index : 2 * index + 2] or _shares(q, k, document_ids, start, end)
            above = upstream[0][:, :, start:end].flatten(1, 2) / total  # (N, R*t, K) float32
            inner = (above * out[:, :, start:end].flatten(1, 2)).sum(-1, keepdim=True)
            above = above.to(q.dtype)
            value_gradient[:, :end] += torch.bmm(shares.transpose(1, 2), above)
            score_gradient = (shares * (torch.bmm(above, v[:, :end].transpose(1, 2)) - inner)).to(q.dtype)
            query_gradients.append(torch.bmm(score_gradient, k[:, :end]).view(N, R, end - start, K))
            key_gradient[:, :end] += torch.bmm(score_gradient.transpose(1, 2), q[:, :, start:end].flatten(1, 2))
        return torch.cat(query_gradients, 2), key_gradient.to(k.dtype), value_gradient.to(v.dtype), None, None


def _shares(q: Tensor, k: Tensor, document_ids: Tensor | None, start: int, end: int) -> tuple[Tensor, Tensor]:
    """exp(score - top of the row) of the queries start..end, 0 where not visible, and its row sums in float32.

    Shapes: (N, R*t, end) in q's dtype, (N, R*t, 1).
    """
    N, R = q.shape[:2]
    scores = torch.bmm(q[:, :, start:end].flatten(1, 2), k[:, :end].transpose(1, 2)).view(N, R, end - start, end)
    # int32: twice as many comparisons an instruction as in int64.
    tokens = torch.arange(end, dtype=torch.int32, device=q.device)
    is_visible = tokens[start:, None] >= tokens  # (t, end)
    if document_ids is not None:
        is_visible = is_visible & (document_ids[:, None, start:end, None] == document_ids[:, None, None, :end])
    wide = scores.to(_wide(q.dtype)).masked_fill(~is_visible, float("-inf"))
    shares = (wide - wide.amax(-1, keepdim=True)).exp().flatten(1, 2)
    return shares.to(q.dtype), shares.sum(-1, keepdim=True)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
