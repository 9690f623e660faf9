"""Causal attention inside documents, in the form that is fastest where it runs.

Shape letters: B sequences, T tokens, S cached positions, H query heads, G key/value heads, K channels per head.
Query head h reads key/value head h // (H / G). Scores are scaled by 1/sqrt(K).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Documents = Tensor | BlockMask | None
"""Document ids (B, T), what `prepare_documents` made of them, or None: one document per sequence."""

QUERY_BLOCK_TOKENS = 128


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

    Why: on CPUs torch's flash kernel gains nothing from bf16, while these products run on the bf16 units; half of the
    square above the diagonal is never computed. The query heads of a group are rows of one product, so that keys and
    values are not repeated.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    scale = K**-0.5
    q = (q * scale).view(B, T, G, H // G, K).permute(0, 2, 3, 1, 4)  # (B, G, H/G, T, K)
    keys = k.permute(0, 2, 3, 1).reshape(B * G, K, T)
    values = v.transpose(1, 2).reshape(B * G, T, K)
    outs = []
    for start in range(0, T, block_tokens):
        end = min(start + block_tokens, T)
        queries = q[:, :, :, start:end].reshape(B * G, -1, K)  # (B*G, H/G * t, K)
        scores = torch.bmm(queries, keys[:, :, :end]).view(B, G, H // G, end - start, end)
        is_visible = torch.arange(start, end, device=q.device)[:, None] >= torch.arange(
            end, device=q.device
        )  # (t, end)
        if document_ids is not None:
            is_same = document_ids[:, start:end, None] == document_ids[:, None, :end]  # (B, t, end)
            is_visible = (is_visible & is_same)[:, None, None]
        shares = scores.float().masked_fill(~is_visible, float("-inf")).softmax(-1).to(v.dtype)
        out = torch.bmm(shares.view(B * G, -1, end), values[:, :end])
        outs.append(out.view(B, G, H // G, end - start, K))
    return torch.cat(outs, 3).permute(0, 3, 1, 2, 4).reshape(B, T, H, K)
