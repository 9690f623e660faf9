"""Batched generation with continuous batching: new requests join while others decode.

Shape letters: B sequences, T tokens, D width, V vocabulary.

A step adds one token to every active response and computes a bounded number of prompt tokens beside it, so that a long
prompt holds up nobody for longer than one chunk. Where the sequences lie is the business of `slots.py`, who is let in
next that of `queue.py`.

A response does not depend on its batch neighbours: its random numbers are its own, and each row is computed for itself.
What other batch sizes can change is rounding: about 1e-6 in fp32 logits, which leaves greedy answers as they are; with
bf16, int8 and int4, where rounding is coarser, a near-tie between two tokens may in rare cases fall the other way.
"""

import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from groundup.base.errors import UserError
from groundup.base.generation import Completion, Delta, EngineStats, PromptScores, SamplingParams
from groundup.base.memory import keep_freed_memory
from groundup.base.seeds import derive_seed
from groundup.infer.kernels.decode import decode_step
from groundup.infer.kernels.native import step_kernels
from groundup.infer.kernels.prefill import Segment, prefill
from groundup.infer.quantize import Weights, prepare
from groundup.infer.queue import FairQueue, share_out
from groundup.infer.response import Response, adjust_logits, initial_addend
from groundup.infer.sampling import RowParams, check_params, sample, stack_params, top_logps
from groundup.infer.scoring import embed_rows, score_prompt
from groundup.infer.slots import Slot, Slots
from groundup.infer.text import ResponseText, StreamDecoder
from groundup.model.transformer import Transformer, rope_frequencies

OFFLINE_PREFILL_TOKENS = 4096
"""Most prompt tokens in one forward when nobody reads along."""


class Decodes(Protocol):
    """The part of a `Tokenizer` that the engine needs."""

    def stream_decoder(self) -> StreamDecoder: ...


@dataclass(eq=False)
class _Prompt:
    """A prompt that is being computed, and the responses that wait for it."""

    tokens: list[int]
    responses: list[Response]
    slot: Slot | None = None
    """None until its first chunk."""


class Engine:
    """Generates from token ids; one thread at a time may use it.

    `max_slots` responses are active at a time, each of at most `max_tokens`, prompt included. Memory of keys and values
    grows with use up to `cache_bytes(config, max_slots, max_tokens)`; prefixes that stay usable live in free slots.
    `prefill_chunk` is the number of prompt tokens that a step computes at most while anyone reads along.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Decodes,
        *,
        max_slots: int = 32,
        max_tokens: int | None = None,
        weights: Weights = "as is",
        prefill_chunk: int = 512,
    ) -> None:
        if max_slots < 1:
            raise UserError(f"max_slots = {max_slots} must be at least 1")
        if prefill_chunk < 2:
            raise UserError(f"prefill_chunk = {prefill_chunk} must be at least 2")
        keep_freed_memory()
        self.tokenizer = tokenizer
        self.max_slots = max_slots
        self.max_tokens = max_tokens or model.config.max_positions
        self.prefill_chunk = prefill_chunk
        self.device = model.embed.weight.device
        self.prefilled_tokens = 0
        """Prompt tokens computed so far; reused ones are not counted."""
        self.reused_tokens = 0
        self.generated_tokens = 0
        self._weights = weights
        self._frequencies = rope_frequencies(model.config).to(self.device)
        self._queue = FairQueue()
        self._prompts: list[_Prompt] = []
        self._active: list[Response] = []
        """The response in slot i at place i."""
        self._held: list[Delta] = []
        self._rows: RowParams | None = None
        self._next_id = 0
        self.refresh(model)

    def refresh(self, model: Transformer) -> None:
        """Take over the weights that the model has now; to be called when training has changed them.

        Why: keys and values of old weights are forgotten, and converted weights are converted anew.
        """
        assert not self.num_active, "responses are being generated"
        self.prepared = prepare(model, self._weights)
        self.model = self.prepared.model
        self._kernels = step_kernels(self.model.config, self.model.norm.weight.dtype, self.device)
        self._forget()

    def _forget(self) -> None:
        # Without kernels of our own fp32 on CPUs: torch's attention of single queries is no faster in bf16 there.
        is_wide = self.device.type == "cpu" and self._kernels is None
        dtype = torch.float32 if is_wide else self.model.norm.weight.dtype
        self.slots = Slots(self.model.config, self.max_slots, self.max_tokens, dtype, self.device)

    # ---- requests

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """All samples of all prompts; `params` is one for all or one for each."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise UserError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        group = object()
        requests = [self._new_request(prompt, p, group, is_streamed=False) for prompt, p in zip(prompts, each)]
        if not self.num_active and not self.num_waiting:
            # The result then does not depend on earlier calls, and a cache that was grown for longer ones is let go.
            self._forget()
        for request in requests:
            self._queue.push(request)
        unfinished = [response for request in reversed(requests) for response in reversed(request)]
        try:
            while unfinished:
                if unfinished[-1].finish_reason is None:
                    self._held = self.step()
                else:
                    unfinished.pop()
        finally:
            self._drop({request[0].request_id for request in requests})
        return [[response.completion() for response in request] for request in requests]

    def submit(self, prompt: Sequence[int], params: SamplingParams, group: Hashable | None = None) -> int:
        """Queue a request; `step` gives out its deltas. Requests of one `group` count as one when slots are given out:
        for a client who asks for many at once."""
        request = self._new_request(prompt, params, group, is_streamed=True)
        self._queue.push(request)
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
        self._drop({request_id})
        self._held = [delta for delta in self._held if delta.request_id != request_id]

    def score(self, prompt: Sequence[int], top: int = 0) -> PromptScores:
        """How likely each token of a prompt is, with the `top` most likely ones at its place."""
        *_, scores = self.score_in_chunks(prompt, top)
        assert scores is not None
        return scores

    def score_in_chunks(self, prompt: Sequence[int], top: int = 0) -> Iterator[PromptScores | None]:
        """`score` for a busy engine: None after each chunk, when `step` may be called, then the scores."""
        return score_prompt(self.prepared, self._checked(prompt), top, self.prefill_chunk)

    def embed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """See `embed_rows`. Shapes: n rows -> (n, D) float32."""
        *_, vectors = self.embed_in_chunks(rows)
        assert vectors is not None
        return vectors

    def embed_in_chunks(self, rows: Sequence[Sequence[int]]) -> Iterator[Tensor | None]:
        """`embed` for a busy engine: None after each chunk, when `step` may be called, then the vectors."""
        return embed_rows(self.prepared, [self._checked(row) for row in rows], self.prefill_chunk)

    @property
    def num_active(self) -> int:
        """Responses that have a slot, or had one and wait for the prompt they share."""
        return len(self._active) + sum(len(prompt.responses) for prompt in self._prompts)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def stats(self) -> EngineStats:
        """How busy the engine is."""
        return EngineStats(
            self.num_active, self.num_waiting, self.max_slots, self.slots.num_tokens,
            self.prefilled_tokens, self.reused_tokens, self.generated_tokens,
        )  # fmt: skip

    def _checked(self, prompt: Sequence[int]) -> list[int]:
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
        return ids

    def _new_request(
        self, prompt: Sequence[int], params: SamplingParams, group: Hashable | None, is_streamed: bool
    ) -> list[Response]:
        vocab_size = self.model.config.vocab_size
        check_params(params, vocab_size)
        ids = self._checked(prompt)
        limit = min(params.max_new_tokens, self.max_tokens - len(ids))
        seed = int.from_bytes(os.urandom(8)) >> 1 if params.seed is None else params.seed
        request_id, self._next_id = self._next_id, self._next_id + 1
        return [
            Response(
                request_id, i, request_id if group is None else (group,), ids, params, limit,
                derive_seed(seed, "sample", i), ResponseText(self.tokenizer.stream_decoder(), params.stop), is_streamed,
                initial_addend(params, vocab_size, self.device),
                params.constraint() if params.constraint else None,
            )
            for i in range(params.num_samples)
        ]  # fmt: skip

    # ---- steps

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Add one token to every active response, let waiting ones in, and compute a chunk of their prompts."""
        deltas, self._held = self._held, []
        try:
            if self._active:
                deltas += self._decode()
            self._admit()
            while self._prompts:
                deltas += self._prefill(self.prefill_chunk if self._is_read_along() else OFFLINE_PREFILL_TOKENS)
                if self._is_read_along():
                    break
                self._admit()
        except BaseException:
            self._abandon()
            raise
        return deltas

    def _is_read_along(self) -> bool:
        """Whether anyone waits for the next token."""
        let_in = [self._active, *(prompt.responses for prompt in self._prompts)]
        return any(response.is_streamed for responses in let_in for response in responses)

    def _abandon(self) -> None:
        """A step was interrupted: nothing that it may have left half-written is used again."""
        let_in = self._active + [response for prompt in self._prompts for response in prompt.responses]
        self._active, self._prompts, self._rows = [], [], None
        for response in let_in:
            self._queue.leave(response)
            response.finish_reason = "cancelled"
            if response.is_streamed:
                self._held.append(Delta(response.request_id, response.sample, "", [], [], "cancelled"))
        self._forget()

    def _decode(self) -> list[Delta]:
        tokens = torch.tensor([response.token_ids[-1] for response in self._active], device=self.device)
        cache = self.slots.cache
        starts = [len(r.prompt) + len(r.token_ids) - 1 for r in self._active]
        if self.device.type == "cpu":
            hidden = decode_step(self.model, cache, tokens, starts, self._frequencies, self._kernels)
        else:
            positions = cache.begin(0, starts, 1)
            hidden = self.model(tokens[:, None], positions, cache=cache)[:, 0]
        for response in self._active:
            assert response.slot is not None
            response.slot.tokens.append(response.token_ids[-1])
        return self._accept(self._active[:], self.prepared.head(hidden).float())

    def _admit(self) -> None:
        """Let in who has a place. Responses to a prompt that is being computed wait for it together."""
        places = self.max_slots - self.num_active
        while places and len(self._queue):
            response = self._queue.pop()
            same = [prompt for prompt in self._prompts if prompt.tokens == response.prompt]
            if same:
                same[0].responses.append(response)
            else:
                self._prompts.append(_Prompt(response.prompt, [response]))
            places -= 1

    def _prefill(self, budget: int) -> list[Delta]:
        """Compute prompt tokens, and the first tokens of the responses whose prompts are then complete."""
        shares = self._shares(budget)
        segments = [
            Segment(slot.index, len(slot.tokens), prompt.tokens[len(slot.tokens) : len(slot.tokens) + share])
            for prompt, slot, share in shares
        ]
        hidden = prefill(self.model, self.slots.cache, segments, self._frequencies)  # (N, D)
        complete, ends = [], []
        end = -1
        for (prompt, slot, _), segment in zip(shares, segments):
            slot.tokens += segment.tokens
            end += len(segment.tokens)
            if len(slot.tokens) == len(prompt.tokens):
                complete.append((prompt, slot))
                ends.append(end)
        self.prefilled_tokens += len(hidden)
        if not complete:
            return []
        for prompt, slot in complete:
            self._activate(prompt, slot)
        rows = [row for row, (prompt, _) in enumerate(complete) for _ in prompt.responses]
        self._rows = None
        return self._accept(self._active[-len(rows) :], self.prepared.head(hidden[ends]).float()[rows])

    def _shares(self, budget: int) -> list[tuple[_Prompt, Slot, int]]:
        """Which prompts to go on with, and by how many tokens."""
        to_do = [
            len(prompt.tokens)
            - (len(prompt.slot.tokens) if prompt.slot else self.slots.longest_prefix(prompt.tokens)[0])
            for prompt in self._prompts
        ]
        shares = zip(self._prompts, share_out(to_do, budget))
        return [(prompt, self._slot_of(prompt), share) for prompt, share in shares if share]

    def _slot_of(self, prompt: _Prompt) -> Slot:
        if prompt.slot is None:
            # Only now: what it begins with may have been computed for another since it was let in.
            prompt.slot = self.slots.take(prompt.tokens)
            self.reused_tokens += len(prompt.slot.tokens)
        return prompt.slot

    def _activate(self, prompt: _Prompt, slot: Slot) -> None:
        """The prompt is complete: each of its responses gets a slot among the active ones."""
        self._prompts.remove(prompt)
        for index, response in enumerate(prompt.responses):
            response.slot = self.slots.fork(slot) if index else slot
            self.reused_tokens += len(prompt.tokens) if index else 0
            self.slots.activate(response.slot)
            self._active.append(response)

    def _accept(self, responses: list[Response], logits: Tensor) -> list[Delta]:
        """Draw a token for each of these active responses and end those that are done."""
        params = [response.params for response in responses]
        rows = self._rows if len(responses) == len(self._active) else None
        if rows is None:
            rows = stack_params(params, [r.key for r in responses], self.device)
        if len(responses) == len(self._active):
            self._rows = rows
        stuck = adjust_logits(logits, responses) if any(response.is_adjusted for response in responses) else []
        drawn, logps = sample(logits, rows, [len(r.token_ids) for r in responses])
        each_logp = [None] * len(responses) if logps is None else logps.tolist()
        each_top = top_logps(logits, rows, params) if rows.most_tops else [None] * len(responses)
        deltas = [
            response.fail()
            if response in stuck
            else response.take(token, logp if response.params.want_logps else None, top)
            for response, token, logp, top in zip(responses, drawn.tolist(), each_logp, each_top)
        ]
        self.generated_tokens += len(responses) - len(stuck)
        for response in responses:
            if response.finish_reason is not None:
                self._release(response)
        return [delta for delta in deltas if delta is not None]

    def _release(self, response: Response) -> None:
        """Free the slot of an active response; the last active one takes its place."""
        assert response.slot is not None
        last = self._active.pop()
        if last is not response:
            self._active[response.slot.index] = last
        self.slots.release(response.slot)
        response.slot = None
        self._queue.leave(response)
        self._rows = None

    @torch.inference_mode()
    def _drop(self, request_ids: set[int]) -> None:
        """End what is left of these requests, wherever it is."""
        for response in self._queue.remove(request_ids):
            response.finish_reason = "cancelled"
        for prompt in self._prompts[:]:
            for response in [r for r in prompt.responses if r.request_id in request_ids]:
                prompt.responses.remove(response)
                response.finish_reason = "cancelled"
                self._queue.leave(response)
            if not prompt.responses:
                self._prompts.remove(prompt)
                if prompt.slot is not None:
                    self.slots.release(prompt.slot)
        for response in [r for r in self._active if r.request_id in request_ids]:
            response.finish_reason = "cancelled"
            self._release(response)
