"""The text of a response while its tokens arrive."""

from typing import Protocol


class StreamDecoder(Protocol):
    """What `Tokenizer.stream_decoder` gives."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class ResponseText:
    """Decodes token by token and ends at the first stop string, no part of which is ever given out.

    Why: a stop string may begin inside one token and end inside another, so text that could be its start is held back.
    """

    def __init__(self, decoder: StreamDecoder, stop: tuple[str, ...]) -> None:
        self._decoder = decoder
        self._stop = stop
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """The text that became final with this token."""
        return self._release(self._decoder.push(token_id), is_last=False)

    def finish(self) -> str:
        """The rest."""
        return self._release(self._decoder.flush(), is_last=True)

    def _release(self, new: str, is_last: bool) -> str:
        if self.is_stopped or not self._stop:
            return "" if self.is_stopped else new
        text = self._held + new
        found = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.is_stopped = True
            return text[: min(found)]
        keep = 0 if is_last else max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
