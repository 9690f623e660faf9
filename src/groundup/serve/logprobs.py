"""Log-probabilities in the two forms of the API: a list of objects (chat) and parallel lists (completions)."""

import codecs
from collections.abc import Sequence
from typing import Any

from groundup.base.generation import TopLogps
from groundup.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""What OpenAI writes for impossible tokens; JSON has no infinity."""


class TokenTexts:
    """The tokens of one text as strings and bytes, in order.

    Choice: a token that is not whole characters is written like "bytes:\\xe2\\x82", as OpenAI does; a control token by
    its name, without bytes. Where a tokenizer puts a space before a text and takes it away again, the first token loses
    it too, unless `keeps_space`.
    """

    def __init__(self, tokenizer: Tokenizer, *, keeps_space: bool) -> None:
        self._tokenizer = tokenizer
        self._names = {token_id: name for name, token_id in tokenizer.control_tokens.items()}
        self._drops_space = tokenizer.strips_leading_space and not keeps_space

    def at_this_place(self, token_id: int) -> tuple[str, bytes]:
        piece = self._tokenizer.token_bytes(token_id)
        if self._drops_space:
            piece = piece.removeprefix(b" ")
        if not piece:
            return self._names.get(token_id, ""), b""
        try:
            return piece.decode(), piece
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece), piece

    def advance(self, token_id: int) -> None:
        """Go on to the place behind this token."""
        if self._tokenizer.token_bytes(token_id):
            self._drops_space = False


class ChatLogprobs:
    """Entries of `choices[].logprobs.content` of one response, as its tokens arrive."""

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._texts = TokenTexts(tokenizer, keeps_space=False)
        self._top = top

    def add(
        self, token_ids: Sequence[int], logps: Sequence[float], top_logps: Sequence[TopLogps]
    ) -> list[dict[str, Any]]:
        entries = []
        for token_id, logp, best in zip(token_ids, logps, top_logps or [[]] * len(token_ids)):
            alternatives = [self._entry(other, other_logp) for other, other_logp in best[: self._top]]
            entries.append({**self._entry(token_id, logp), "top_logprobs": alternatives})
            self._texts.advance(token_id)
        return entries

    def _entry(self, token_id: int, logp: float) -> dict[str, Any]:
        text, piece = self._texts.at_this_place(token_id)
        return {"token": text, "logprob": max(logp, LEAST_LOGPROB), "bytes": list(piece)}


class CompletionLogprobs:
    """The lists of `choices[].logprobs` of one completion, as its tokens arrive.

    Offsets count characters from the prompt's first. Choice: the token that was drawn is always among the top ones, as
    with OpenAI, so that there may be one more than was asked for.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, offset: int, *, keeps_space: bool) -> None:
        self._texts = TokenTexts(tokenizer, keeps_space=keeps_space)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._top = top
        self._offset = offset

    def add(
        self, token_ids: Sequence[int], logps: Sequence[float | None], top_logps: Sequence[TopLogps]
    ) -> dict[str, Any]:
        """The lists for these tokens; a token that nothing precedes has None for a log-probability."""
        tokens, chosen, top, offsets = [], [], [], []
        for token_id, logp, best in zip(token_ids, logps, top_logps or [[]] * len(token_ids)):
            text, piece = self._texts.at_this_place(token_id)
            shown = {self._texts.at_this_place(other)[0]: max(p, LEAST_LOGPROB) for other, p in best[: self._top]}
            tokens.append(text)
            offsets.append(self._offset)
            chosen.append(None if logp is None else max(logp, LEAST_LOGPROB))
            top.append(None if logp is None else {**shown, text: max(logp, LEAST_LOGPROB)})
            self._offset += len(self._utf8.decode(piece))
            self._texts.advance(token_id)
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": top if self._top else None,
            "text_offset": offsets,
        }
