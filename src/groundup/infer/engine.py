"""Batched generation with continuous batching: new requests join while others decode.

Shape letters: B sequences, T tokens, D width, V vocabulary.

Active sequences occupy cache slots 0..n-1. A sequence that ends changes places with the last active one, so that steps
stay dense; what its slot held remains usable as a prefix until a new sequence takes the slot.

A response does not depend on its batch neighbours: its random numbers are its own, and each row is computed for itself.
What other batch sizes can change is rounding: about 1e-6 in fp32 logits, which leaves greedy answers as they are; with
bf16, int8 and int4, where rounding is coarser, a near-tie between two tokens may in rare cases fall the other way.
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from groundup.base.errors import UserError
from groundup.base.generation import Completion, Delta, FinishReason, SamplingParams
from groundup.base.seeds import derive_seed
from groundup.infer.kernels.decode import decode_step
from groundup.infer.quantize import Weights, prepare
from groundup.infer.sampling import RowParams, check_params, sample, stack_params
from groundup.infer.text import ResponseText, StreamDecoder
from groundup.model.cache import SlotCache
from groundup.model.transformer import Transformer, rope_frequencies

PREFILL_TOKENS = 4096
"""Most prompt tokens (padding included) in one forward, unless a single prompt is longer."""
MIN_PREFIX_TOKENS = 16
"""Shorter common prefixes are computed anew: a forward in which all rows begin at 0 needs no mask."""


class Decodes(Protocol):
    """The part of a `Tokenizer` that the engine needs."""

    def stream_decoder(self) -> StreamDecoder: ...


@dataclass(eq=False)
class _Response:
    """One sample of one request, waiting, active or finished."""

    request_id: int
    sample: int
    prompt: list[int]
    params: SamplingParams
    limit: int
    """Most new tokens, within the context."""
    key: int
    text: ResponseText
    is_streamed: bool
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def cached(self) -> list[int]:
        """The tokens whose keys and values its slot holds: all but the newest."""
        return self.prompt + self.token_ids[:-1]

    def take(self, token: int, logp: float | None) -> Delta | None:
        """Add a token; a delta when this response is streamed."""
        self.token_ids.append(token)
        if logp is not None:
            self.logps.append(logp)
        if token in self.params.stop_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.limit:
            self.finish_reason = "length"
        # Without stop strings, text that nobody waits for is decoded once, at the end.
        is_due = self.is_streamed or bool(self.params.stop)
        text = self._text_of(self.token_ids[-1:]) if is_due else ""
        if self.finish_reason is not None:
            text += self.text.finish() if is_due else self._text_of(self.token_ids) + self.text.finish()
        if self.text.is_stopped:
            self.finish_reason = "stop"
        self.pieces.append(text)
        if not self.is_streamed:
            return None
        logps = [] if logp is None else [logp]
        return Delta(self.request_id, self.sample, text, [token], logps, self.finish_reason)

    def _text_of(self, token_ids: list[int]) -> str:
        return "".join(self.text.push(token) for token in token_ids if token not in self.params.stop_ids)

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion("".join(self.pieces), self.token_ids, self.finish_reason, self.logps)


class Engine:
    """Generates from token ids; one thread at a time may use it."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Decodes,
        *,
        max_slots: int = 32,
        max_tokens: int | None = None,
        weights: Weights = "as is",
    ) -> None:
        if max_slots < 1:
            raise UserError(f"max_slots = {max_slots} must be at least 1")
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        self.max_tokens = max_tokens or model.config.max_positions
        self.device = model.embed.weight.device
        self._weights = weights
        self._frequencies = rope_frequencies(model.config).to(self.device)
        self._active: list[_Response] = []
        self.refresh(model)
        self.prefilled_tokens = 0
        """Prompt tokens computed so far; reused ones are not counted."""
        self._waiting: deque[_Response] = deque()
        self._held: list[Delta] = []
        self._rows: RowParams | None = None
        self._next_id = 0

    def refresh(self, model: Transformer) -> None:
        """Take over the weights that the model has now; to be called when training has changed them.

        Why: keys and values of old weights are forgotten, and converted weights are converted anew.
        """
        assert not self._active, "responses are being generated"
        self.prepared = prepare(model, self._weights)
        self.model = self.prepared.model
        self._forget()

    def _forget(self) -> None:
        # fp32 on CPUs: attention of single queries is no faster in bf16 there, and scores keep their precision.
        dtype = torch.float32 if self.device.type == "cpu" else self.model.norm.weight.dtype
        self.cache = SlotCache(self.model.config, self.max_slots, dtype, self.device)
        self._resident: list[list[int]] = [[] for _ in range(self.max_slots)]

    # ---- requests

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """All samples of all prompts; `params` is one for all or one for each."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        requests = [self._new_request(prompt, p, is_streamed=False) for prompt, p in zip(prompts, each)]
        if not self._active and not self._waiting:
            # The result then does not depend on earlier calls, and a cache that was grown for longer ones is let go.
            self._forget()
        self._waiting.extend(response for request in requests for response in request)
        try:
            while any(response.finish_reason is None for request in requests for response in request):
                self._held = self.step()
        finally:
            for request in requests:
                for response in request:
                    self._drop(response)
        return [[response.completion() for response in request] for request in requests]

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queue a request; `step` gives out its deltas."""
        request = self._new_request(prompt, params, is_streamed=True)
        self._waiting.extend(request)
        return request[0].request_id

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Delta]:
        """The deltas of one request; closing the iterator cancels it."""
        request_id = self.submit(prompt, params)
        unfinished = params.num_samples
        try:
            while unfinished:
                deltas = self.step()
                self._held += [delta for delta in deltas if delta.request_id != request_id]
                for delta in deltas:
                    if delta.request_id == request_id:
                        unfinished -= delta.finish_reason is not None
                        yield delta
        finally:
            self.cancel(request_id)

    def cancel(self, request_id: int) -> None:
        """End a request at once and free its slots; nothing more is given out for it. Unknown ids are ignored."""
        for response in [*self._active, *self._waiting]:
            if response.request_id == request_id:
                self._drop(response)
        self._held = [delta for delta in self._held if delta.request_id != request_id]

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def _new_request(self, prompt: Sequence[int], params: SamplingParams, is_streamed: bool) -> list[_Response]:
        check_params(params)
        ids = [int(token) for token in prompt]
        vocab_size = self.model.config.vocab_size
        if not ids:
            raise UserError("the prompt has no tokens", "begin it with the tokenizer's BOS id")
        if min(ids) < 0 or max(ids) >= vocab_size:
            raise UserError(f"the prompt has a token id outside 0..{vocab_size - 1}", "is this the model's tokenizer?")
        if len(ids) >= self.max_tokens:
            raise UserError(
                f"the prompt has {len(ids)} tokens, but the context holds {self.max_tokens}, new tokens included",
                "shorten the prompt",
            )
        limit = min(params.max_new_tokens, self.max_tokens - len(ids))
        seed = int.from_bytes(os.urandom(8)) >> 1 if params.seed is None else params.seed
        request_id, self._next_id = self._next_id, self._next_id + 1
        return [
            _Response(
                request_id, i, ids, params, limit, derive_seed(seed, "sample", i),
                ResponseText(self.tokenizer.stream_decoder(), params.stop), is_streamed,
            )
            for i in range(params.num_samples)
        ]  # fmt: skip

    # ---- steps

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Let waiting requests in, then add one token to every active response."""
        deltas, self._held = self._held, []
        if self._active:
            deltas += self._decode()
        while self._waiting and len(self._active) < self.max_slots:
            deltas += self._admit()
        return deltas

    def _decode(self) -> list[Delta]:
        tokens = torch.tensor([response.token_ids[-1] for response in self._active], device=self.device)
        self.cache.begin(0, [len(r.prompt) + len(r.token_ids) - 1 for r in self._active], 1)
        if self.device.type == "cpu":
            hidden = decode_step(self.model, self.cache, tokens, self._frequencies)
        else:
            hidden = self.model(tokens[:, None], self.cache.positions, cache=self.cache)[:, 0]
        return self._accept(self._active[:], self.prepared.head(hidden).float())

    def _admit(self) -> list[Delta]:
        """Compute the prompts of the next waiting responses, as many as fit into one forward, and their first tokens.

        Why: responses to one prompt that are let in together share one row of the forward; others copy the longest
        prefix that some slot holds.
        """
        first = len(self._active)
        leaders: list[_Response] = []
        starts: list[int] = []
        followers: list[_Response] = []
        row_of: dict[tuple[int, ...], int] = {}
        while self._waiting and first + len(leaders) + len(followers) < self.max_slots:
            response, slot = self._waiting[0], first + len(leaders)
            prompt = response.prompt
            if tuple(prompt) in row_of:
                followers.append(self._waiting.popleft())
                continue
            start, source = self._longest_prefix(prompt, slot)
            lengths = [len(leader.prompt) - begin for leader, begin in zip(leaders, starts)]
            if leaders and max(*lengths, len(prompt) - start) * (len(leaders) + 1) > PREFILL_TOKENS:
                break
            if start and source != slot:
                self.cache.copy(source, slot, start)
            self._resident[slot] = prompt[:start]
            row_of[tuple(prompt)] = len(leaders)
            leaders.append(self._waiting.popleft())
            starts.append(start)
        logits = self._prefill(first, [leader.prompt[start:] for leader, start in zip(leaders, starts)], starts)
        self._active += leaders
        for follower in followers:
            self.cache.copy(first + row_of[tuple(follower.prompt)], len(self._active), len(follower.prompt))
            self._active.append(follower)
        self._rows = None
        return self._accept(self._active[first:], logits[[row_of[tuple(r.prompt)] for r in self._active[first:]]])

    def _longest_prefix(self, prompt: list[int], free_slot: int) -> tuple[int, int]:
        """How many tokens of the prompt some slot holds, and which slot; the last token is always computed anew.

        `free_slot` is preferred, because nothing has to be copied there.
        """
        best, source = _common_length(prompt, self._resident[free_slot]), free_slot
        for slot in range(min(self.max_slots, self.cache.capacity[0])):
            is_active = slot < len(self._active)
            held = self._active[slot].cached if is_active else self._resident[slot]
            length = _common_length(prompt, held)
            if length > best:
                best, source = length, slot
        best = min(best, len(prompt) - 1)
        return (best, source) if best >= MIN_PREFIX_TOKENS else (0, free_slot)

    def _prefill(self, first_slot: int, rows: list[list[int]], starts: list[int]) -> Tensor:
        """Next-token logits after each row. Shapes: -> (B, V) float32."""
        ends = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        tokens = pad_sequence([torch.tensor(row, device=self.device) for row in rows], batch_first=True)  # (B, T)
        positions = self.cache.begin(first_slot, starts, tokens.shape[1])
        hidden = self.model(tokens, positions, cache=self.cache)  # (B, T, D)
        self.prefilled_tokens += sum(len(row) for row in rows)
        logits: Tensor = self.prepared.head(hidden[torch.arange(len(rows), device=self.device), ends])
        return logits.float()

    def _accept(self, responses: list[_Response], logits: Tensor) -> list[Delta]:
        """Draw a token for each of these active responses, the last ones to be let in, and end those that are done."""
        rows = self._rows if len(responses) == len(self._active) else None
        if rows is None:
            rows = stack_params([r.params for r in responses], [r.key for r in responses], self.device)
        if len(responses) == len(self._active):
            self._rows = rows
        drawn, logps = sample(logits, rows, [len(r.token_ids) for r in responses])
        each_logp = [None] * len(responses) if logps is None else logps.tolist()
        deltas = [
            response.take(token, logp if response.params.want_logps else None)
            for response, token, logp in zip(responses, drawn.tolist(), each_logp)
        ]
        for slot in reversed(range(len(self._active))):
            if self._active[slot].finish_reason is not None:
                self._release(slot)
        return [delta for delta in deltas if delta is not None]

    def _drop(self, response: _Response) -> None:
        if response.finish_reason is not None:
            return
        response.finish_reason = "cancelled"
        if response in self._waiting:
            self._waiting.remove(response)
        elif response in self._active:
            self._release(self._active.index(response))

    @torch.inference_mode()
    def _release(self, slot: int) -> None:
        """Free a slot: the last active response moves into it, and what it held moves behind the active ones."""
        last = len(self._active) - 1
        if slot != last:
            self.cache.swap(slot, last)
            self._active[slot], self._active[last] = self._active[last], self._active[slot]
        self._resident[last] = self._active.pop().cached
        self._rows = None


def _common_length(first: list[int], second: list[int]) -> int:
    length = 0
    for a, b in zip(first, second):
        if a != b:
            break
        length += 1
    return length
