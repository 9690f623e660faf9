"""Log-probabilities of given tokens, reward models' scores of given responses, and embeddings of texts.

Shape letters: B sequences, T tokens, D width, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from groundup.base.errors import UserError
from groundup.base.generation import PromptScores, TopLogps
from groundup.infer.kernels.prefill import Segment, prefill
from groundup.infer.quantize import Prepared
from groundup.infer.sampling import token_logps
from groundup.model.cache import SlotCache
from groundup.model.scalar import ScalarModel
from groundup.model.transformer import Transformer, rope_frequencies

# Measured: with 8192 tokens a CPU takes a third longer, because activations leave its cache; a GPU wants many.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 8192
"""Tokens (padding included) in one forward, unless a single row is longer."""
LOGIT_ROWS = 1024
"""Positions whose logits exist at one time."""


@torch.inference_mode()
def score_tokens(model: Transformer, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probability in nats of each token given those before it; a row's first token has none before it.

    Shapes: a row of n tokens -> (n - 1,) float32, on the CPU.
    Why: rows of like length are computed together, padded on the right, where causal attention never looks.
    """
    scores: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in _groups_by_length(rows, model.embed.weight.device):
        tokens = pad_sequence([torch.tensor(rows[index]) for index in group], batch_first=True)  # (B, T)
        logps = _score_batch(model, tokens.to(model.embed.weight.device)).cpu()
        for index, row_logps in zip(group, logps):
            scores[index] = row_logps[: len(rows[index]) - 1].clone()
    return scores


@torch.inference_mode()
def score_responses(model: ScalarModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """A scalar model's score of each row, read at its last token.

    Shapes: n rows -> (n,) float32, on the CPU.
    """
    scores = torch.empty(len(rows))
    for group in _groups_by_length(rows, model.embed.weight.device):
        tokens = pad_sequence([torch.tensor(rows[index]) for index in group], batch_first=True)  # (B, T)
        ends = torch.tensor([place * tokens.shape[1] + len(rows[index]) - 1 for place, index in enumerate(group)])
        device = model.embed.weight.device
        scores[group] = model.scores(model(tokens.to(device), rows=ends.to(device))).cpu()
    return scores


@torch.inference_mode()
def score_samples(
    model: ScalarModel, prompts: Sequence[Sequence[int]], places: Sequence[int], responses: Sequence[Sequence[int]]
) -> Tensor:
    """`score_responses` of prompts[places[i]] + responses[i]; a prompt of several responses is computed once.

    Shapes: n responses and n places -> (n,) float32, on the CPU.
    Raises: UserError for a prompt or response without tokens.
    """
    device, dtype = model.embed.weight.device, model.embed.weight.dtype
    scores = torch.empty(len(responses))
    all_prompts = SlotCache(model.config, len(prompts), dtype, device)
    frequencies = rope_frequencies(model.config).to(device)
    for group in _groups_by_length(prompts, device):
        prefill(model, all_prompts, [Segment(slot, 0, prompts[slot]) for slot in group], frequencies)
    for group in _groups_by_length(responses, device):
        slots = [places[index] for index in group]
        starts = [len(prompts[slot]) for slot in slots]
        tokens = pad_sequence([torch.tensor(responses[index]) for index in group], batch_first=True)  # (B, T)
        T = tokens.shape[1]
        cache = all_prompts.select(slots, max(starts) + T)
        ends = torch.tensor([row * T + len(responses[index]) - 1 for row, index in enumerate(group)], device=device)
        hidden = model(tokens.to(device), cache.begin(0, starts, T), cache=cache, rows=ends)
        scores[group] = model.scores(hidden).cpu()
    return scores


@torch.inference_mode()
def score_prompt(
    prepared: Prepared, prompt: Sequence[int], top: int, chunk_tokens: int
) -> Iterator[PromptScores | None]:
    """How likely a prompt is: None after each chunk of it, then the scores."""
    logps: list[float] = []
    tops: list[TopLogps] = []
    for ((_, start, hidden),) in _hidden_in_chunks(prepared.model, [prompt], chunk_tokens):
        targets = torch.tensor(prompt[start + 1 : start + 1 + len(hidden)], device=hidden.device)  # (T,)
        logits = prepared.head(hidden[: len(targets)]).float()  # (T, V)
        logps += token_logps(logits, targets).tolist()
        values, indices = logits.topk(min(top, logits.shape[1]), -1)
        values -= logits.logsumexp(-1, keepdim=True)
        tops += [list(zip(*row)) for row in zip(indices.tolist(), values.tolist())]
        yield None
    yield PromptScores(logps, tops)


@torch.inference_mode()
def embed_rows(prepared: Prepared, rows: Sequence[Sequence[int]], chunk_tokens: int) -> Iterator[Tensor | None]:
    """One vector for each row: None after each chunk, then the vectors.

    Shapes: n rows -> (n, D) float32 of length 1, on the CPU.
    Choice: the mean of the final hidden states, scaled to length 1. The model was not trained for it; the mean of all
    positions serves better than the last one, which is about the next token.
    """
    sums = torch.zeros(len(rows), prepared.model.config.dim)
    for parts in _hidden_in_chunks(prepared.model, rows, chunk_tokens):
        for row, _, hidden in parts:
            sums[row] += hidden.float().sum(0).cpu()
        yield None
    yield torch.nn.functional.normalize(sums, dim=-1)


def _hidden_in_chunks(
    model: Transformer, rows: Sequence[Sequence[int]], chunk_tokens: int
) -> Iterator[list[tuple[int, int, Tensor]]]:
    """Forwards of at most `chunk_tokens` tokens: the (row, start, hidden states (T, D)) of each.

    Why: short rows are taken together; a longer one is cut, in a cache of its own.
    """
    device = model.embed.weight.device
    frequencies = rope_frequencies(model.config).to(device)
    first = 0
    while first < len(rows):
        end, total = first, 0
        while end < len(rows) and (end == first or total + len(rows[end]) <= chunk_tokens):
            total += len(rows[end])
            end += 1
        cache = SlotCache(model.config, end - first, model.embed.weight.dtype, device)
        for start in range(0, total if end - first == 1 else 1, chunk_tokens):
            pieces = [row[start : start + chunk_tokens] for row in rows[first:end]]
            segments = [Segment(slot, start, piece) for slot, piece in enumerate(pieces)]
            hidden = torch.split(prefill(model, cache, segments, frequencies), [len(piece) for piece in pieces])
            yield [(first + slot, start, part) for slot, part in enumerate(hidden)]
        first = end


def _groups_by_length(rows: Sequence[Sequence[int]], device: torch.device) -> Iterator[list[int]]:
    """Indices of rows to compute together, the longest first."""
    batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
    group: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])):
        if len(rows[index]) == 0:
            raise UserError(f"row {index} to be scored has no tokens")
        if group and (len(group) + 1) * len(rows[group[0]]) > batch_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _score_batch(model: Transformer, tokens: Tensor) -> Tensor:
    """Shapes: (B, T) -> (B, T - 1)."""
    hidden = model(tokens[:, :-1]).flatten(0, 1)  # (B*(T-1), D)
    targets = tokens[:, 1:].flatten()
    chunks = zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS))
    parts = [token_logps(model.logits(part), part_targets) for part, part_targets in chunks]
    return torch.cat(parts).view(len(tokens), -1)
