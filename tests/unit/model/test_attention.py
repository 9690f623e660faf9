"""Every form of attention against a float64 loop."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from groundup.model.attention import (
    attend,
    block_causal_attend,
    document_blocks,
    is_same_document_before,
    prepare_documents,
    sdpa_attend,
)

B, T, K = 2, 21, 8


def naive(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None) -> Tensor:
    rows, tokens, heads, channels = q.shape
    repeat = heads // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(rows):
        for h in range(heads):
            for t in range(tokens):
                seen = [s for s in range(t + 1) if document_ids is None or document_ids[b, s] == document_ids[b, t]]
                scores = k[b, seen, h // repeat] @ q[b, t, h] / math.sqrt(channels)
                out[b, t, h] = scores.softmax(0) @ v[b, seen, h // repeat]
    return out


def make(heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    q, k, v = (torch.randn(B, T, n, K, dtype=torch.float64, generator=generator) for n in (heads, kv_heads, kv_heads))
    document_ids = torch.tensor([[0] * 5 + [1] * 9 + [2] * 7, [3] * 20 + [0]])
    return q, k, v, document_ids


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("has_documents", [False, True])
def test_all_forms_agree_with_the_loop(heads: int, kv_heads: int, has_documents: bool) -> None:
    q, k, v, ids = make(heads, kv_heads)
    document_ids = ids if has_documents else None
    expected = naive(q, k, v, document_ids)
    torch.testing.assert_close(sdpa_attend(q, k, v, document_ids), expected)
    for block_tokens in (4, 7, 64):
        torch.testing.assert_close(
            block_causal_attend(q, k, v, document_ids, block_tokens), expected, atol=1e-6, rtol=1e-5
        )
    torch.testing.assert_close(attend(q, k, v, document_ids), expected, atol=1e-6, rtol=1e-5)


def test_flex_blocks_see_what_the_mask_sees() -> None:
    q, k, v, document_ids = make(4, 2)
    q, k, v = q.float(), k.float(), v.float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out = attend(q, k, v, document_blocks(document_ids))
    torch.testing.assert_close(out, sdpa_attend(q, k, v, document_ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept_tokens", [T, 0])
def test_gradients_of_block_causal_are_those_of_sdpa(kept_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groundup.model.attention.MAX_KEPT_TOKENS", kept_tokens)
    q, k, v, document_ids = make(4, 2)
    gradients = []
    for form in (sdpa_attend, lambda *inputs: block_causal_attend(*inputs, 8)):
        inputs = [x.float().requires_grad_() for x in (q, k, v)]
        form(*inputs, document_ids).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_visibility_by_hand() -> None:
    visible = is_same_document_before(torch.tensor([[7, 7, 2]]))
    assert visible.tolist() == [[[[True, False, False], [True, True, False], [False, False, True]]]]


def test_document_ids_stay_as_they_are_off_cuda() -> None:
    ids = torch.tensor([[0, 1]])
    assert prepare_documents(ids, is_compiled=True) is ids
    assert prepare_documents(None, is_compiled=True) is None
