"""Rows of query and key: Meta's order and ours; fused tensors and their parts."""

import torch

from groundup.model.config import ModelConfig, RopeScaling
from groundup.model.transformer import Transformer
from groundup.model.weights import layout

CONFIG = ModelConfig(32, 16, 2, 4, 2, 6, 20)


def test_the_row_order_is_the_published_one() -> None:
    rows = torch.arange(16.0)[:, None].expand(16, 3)
    ours = layout.to_rotate_half(rows, 2)
    assert ours[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(layout.to_interleaved(ours, 2), rows)


def test_scores_after_rotation_are_equal_in_both_orders() -> None:
    torch.manual_seed(0)
    heads, K, position = 3, 8, 5
    wq, wk, x = torch.randn(heads * K, 7).double(), torch.randn(heads * K, 7).double(), torch.randn(7).double()
    angles = position * 10_000.0 ** (-torch.arange(0, K, 2).double() / K)
    turned = torch.view_as_complex((wq @ x).view(heads, K // 2, 2)) * torch.polar(torch.ones(K // 2).double(), angles)
    meta_scores = (torch.view_as_real(turned).flatten(1) * (wk @ x).view(heads, K)).sum(-1)
    q, k = ((layout.to_rotate_half(w, heads) @ x).view(heads, K) for w in (wq, wk))
    first, second = q.chunk(2, -1)
    ours = torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)
    torch.testing.assert_close((ours * k).sum(-1), meta_scores)


def test_names_are_those_of_the_transformer() -> None:
    for tied in (False, True):
        config = ModelConfig(32, 16, 2, 4, 2, 6, 20, tie_embeddings=tied, rope_scaling=RopeScaling("linear", 2.0))
        state = Transformer(config).state_dict()
        assert list(state) == layout.state_names(config)
        parts = dict(layout.unfuse(config, state))
        assert {part: tuple(tensor.shape) for part, tensor in parts.items()} == layout.part_shapes(config)


def test_fuse_undoes_unfuse() -> None:
    model = Transformer(CONFIG)
    model.init_weights(0)
    state = model.state_dict()
    parts = {
        part: layout.Stored(tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor)
        for part, tensor in layout.unfuse_interleaved(CONFIG, state)
    }
    fused = layout.fuse(CONFIG, layout.from_interleaved_parts(CONFIG, parts), torch.float32)
    assert fused.keys() == state.keys()
    assert all(torch.equal(fused[name], state[name]) for name in state)
