"""Dialogues packed into rows of the context length, for supervised fine-tuning.

Source: Llama 2 (arXiv 2307.09288) section 3.1: prompts and answers fill the sequence, loss on answer tokens only.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from groundup.base.errors import UserError
from groundup.base.progress import track
from groundup.base.records import Dialogue
from groundup.base.seeds import derive_seed
from groundup.data.batches import PADDING_ID, Batch, Int64s, ceil_div, fill_micro_batches, permute, positions_within
from groundup.text.chat import ChatFormat

TooLong = Literal["drop", "truncate"]


@dataclass
class PackStats:
    """What became of the dialogues; tokens are counted as they lie in the rows."""

    dialogues: int = 0
    """In the rows."""
    tokens: int = 0
    target_tokens: int = 0
    rows: int = 0
    fill_fraction: float = 0.0
    """Share of the rows that is no padding."""
    too_long_dropped: int = 0
    turns_left_out: int = 0
    """Dialogues that lost their oldest exchanges, to fit."""
    ends_cut: int = 0
    """Dialogues whose last response was cut, to fit."""
    no_target_dropped: int = 0
    refused: int = 0
    """Dialogues that the chat format does not take, such as those with its own tags in a message."""
    refusal: str = ""
    """Why the first of them was refused."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        lost = {
            "longer than the context, dropped": self.too_long_dropped,
            "shortened by their oldest turns": self.turns_left_out,
            "with the end of the response cut": self.ends_cut,
            "without a response token, dropped": self.no_target_dropped,
            f"refused by the chat format (first: {self.refusal})": self.refused,
        }
        notes = "".join(f"; {count} {what}" for what, count in lost.items() if count)
        return (
            f"{self.dialogues} dialogues, {self.tokens} tokens ({self.target_tokens} carry loss) in {self.rows} rows, "
            f"{self.fill_fraction:.1%} full{notes}"
        )


@dataclass(frozen=True)
class _Encoded:
    ids: NDArray[np.int32]
    is_response: NDArray[np.bool_]


class PackedBatches:
    """Dialogues packed best-fit into rows; which lie together is drawn once from the seed, the rows' order each epoch.

    The last batch of an epoch has the rows that are left, so that an epoch is every dialogue exactly once.

    Choice: the paper does not say whether packed samples attend to each other; they do unless `isolate`.
    """

    def __init__(
        self,
        dialogues: Iterable[Dialogue],
        chat: ChatFormat,
        batch_rows: int,
        context: int,
        seed: int,
        *,
        isolate: bool = False,
        too_long: TooLong = "drop",
    ) -> None:
        """Encode and pack everything. A row holds context + 1 tokens, since the last is only ever a target.

        Raises: UserError when no dialogue is left, that is, no token carries loss.
        """
        self.batch_rows, self.context, self.seed, self.isolate = batch_rows, context, seed, isolate
        self.stats = PackStats()
        encoder = _Encoder(chat, context + 1, too_long, self.stats)
        encoded = (encoder.encode(dialogue) for dialogue in track(dialogues, "encode dialogues", unit="dialogues"))
        self._dialogues = [item for item in encoded if item is not None]
        if not self._dialogues:
            raise UserError(f"no dialogue to train on: no token carries loss ({self.stats.line()})")
        lengths = np.array([len(item.ids) for item in self._dialogues])
        shuffled = permute(np.arange(len(lengths)), len(lengths), derive_seed(seed, "pack"))
        self.rows = pack(lengths, shuffled, context + 1)
        self.steps_per_epoch = ceil_div(len(self.rows), batch_rows)
        self.stats.dialogues, self.stats.rows, self.stats.tokens = len(lengths), len(self.rows), int(lengths.sum())
        self.stats.target_tokens = sum(int(item.is_response.sum()) for item in self._dialogues)
        self.stats.fill_fraction = self.stats.tokens / (len(self.rows) * (context + 1))

    def row_ids(self, step: int) -> Int64s:
        """The rows of the global batch of `step`: (batch_rows,), fewer in the last step of an epoch."""
        epoch, number = divmod(step, self.steps_per_epoch)
        places = np.arange(number * self.batch_rows, min((number + 1) * self.batch_rows, len(self.rows)))
        return permute(places, len(self.rows), derive_seed(self.seed, "epoch", epoch))

    def micro_batches(self, step: int, rank: int, world_size: int, micro_rows: int) -> list[Batch]:
        return list(fill_micro_batches(self.row_ids(step), rank, world_size, micro_rows, self.batch_rows, self.build))

    def build(self, row_ids: Int64s) -> Batch:
        """The rows of these numbers; (len(row_ids), T)."""
        shape = (len(row_ids), self.context + 1)
        tokens, is_response = np.full(shape, PADDING_ID, dtype=np.int64), np.zeros(shape, dtype=bool)
        document_ids = np.empty(shape, dtype=np.int64)
        for row, row_id in enumerate(row_ids.tolist()):
            start = 0
            for number, index in enumerate(self.rows[row_id]):
                item = self._dialogues[index]
                stop = start + len(item.ids)
                tokens[row, start:stop], is_response[row, start:stop] = item.ids, item.is_response
                document_ids[row, start:stop] = number
                start = stop
            document_ids[row, start:] = len(self.rows[row_id])
        is_target = is_response[:, 1:] & (document_ids[:, 1:] == document_ids[:, :-1])
        seen = document_ids[:, :-1]
        return Batch(
            torch.from_numpy(tokens[:, :-1].copy()),
            torch.from_numpy(tokens[:, 1:].copy()),
            torch.from_numpy(is_target),
            torch.from_numpy(positions_within(seen)) if self.isolate else None,
            torch.from_numpy(seen.copy()) if self.isolate else None,
        )


class _Encoder:
    """Dialogues to ids of at most `max_tokens`, counting what is lost."""

    def __init__(self, chat: ChatFormat, max_tokens: int, too_long: TooLong, stats: PackStats) -> None:
        self.chat, self.max_tokens, self.too_long, self.stats = chat, max_tokens, too_long, stats

    def encode(self, dialogue: Dialogue) -> _Encoded | None:
        try:
            ids, is_response = self.chat.encode_dialogue(dialogue)
        except UserError as error:
            self.stats.refused += 1
            self.stats.refusal = self.stats.refusal or error.message
            return None
        if len(ids) > self.max_tokens:
            if self.too_long == "drop":
                self.stats.too_long_dropped += 1
                return None
            ids, is_response = self._shorten(dialogue)
        # The first token of a row has nothing before it, so it cannot be a target.
        is_response = [False, *is_response[1:]]
        if not any(is_response):
            self.stats.no_target_dropped += 1
            return None
        return _Encoded(np.array(ids, dtype=np.int32), np.array(is_response, dtype=bool))

    def _shorten(self, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
        """Leave out the oldest exchanges (never the system message) until it fits, then cut the end."""
        ids, is_response = self.chat.encode_dialogue(dialogue)
        has_system = dialogue.messages[0].role == "system"
        system, body = dialogue.messages[:has_system], dialogue.messages[has_system:]
        self.stats.turns_left_out += len(body) > 2
        while len(ids) > self.max_tokens and len(body) > 2:
            body = body[2:]
            ids, is_response = self.chat.encode_dialogue(replace(dialogue, messages=system + body))
        self.stats.ends_cut += len(ids) > self.max_tokens
        return ids[: self.max_tokens], is_response[: self.max_tokens]


def pack(lengths: NDArray[np.int64], order: Int64s, capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each item, longest first (ties in `order`), goes to the fullest row it fits into.

    Time grows as n log(capacity); rows are listed in the order they were begun.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    """The sizes of gap that some row has, sorted."""
    for index in order[np.argsort(-lengths[order], kind="stable")].tolist():
        length = int(lengths[index])
        place = bisect_left(rooms, length)
        if place == len(rooms):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rows_by_room[room], rooms[place]
        rows[row].append(index)
        left = room - length
        if left not in rows_by_room:
            rows_by_room[left] = []
            insort(rooms, left)
        rows_by_room[left].append(row)
    return rows
