"""Who is let in next when responses wait for a slot, and whose prompt is computed next."""

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence

from groundup.infer.response import Response


class FairQueue:
    """Responses in line, each for the group it belongs to: the samples of a request, or whatever was given one name.

    Choice: a free slot goes to the group that has the fewest, and among equals to the one that has waited longest. So a
    request for one response never waits for all samples of an earlier request, and every group always has a turn left.
    """

    def __init__(self) -> None:
        self._lines: dict[Hashable, deque[Response]] = {}
        self._running: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def push(self, responses: Iterable[Response]) -> None:
        for response in responses:
            self._lines.setdefault(response.group, deque()).append(response)

    def pop(self) -> Response:
        """The next to be let in; `leave` is to be called when it has ended."""
        group = min(self._lines, key=self._running.__getitem__)
        line = self._lines.pop(group)
        response = line.popleft()
        if line:
            self._lines[group] = line  # behind the others
        self._running[group] += 1
        return response

    def leave(self, response: Response) -> None:
        """A response that was let in has ended."""
        self._running[response.group] -= 1
        if not self._running[response.group]:
            del self._running[response.group]

    def remove(self, request_ids: set[int]) -> list[Response]:
        """Take all responses of these requests out of the line."""
        removed = []
        for group, line in list(self._lines.items()):
            kept = deque(response for response in line if response.request_id not in request_ids)
            if len(kept) < len(line):
                removed += [response for response in line if response.request_id in request_ids]
                self._lines[group] = kept
            if not kept:
                del self._lines[group]
        return removed


def share_out(to_do: Sequence[int], budget: int) -> list[int]:
    """How many of its `to_do` tokens each prompt gets out of a budget; the prompts are in order of age, oldest first.

    Choice: half of the budget is the oldest prompt's, so that it gets on whatever else comes; the rest goes to those
    with the least to do, so that they do not wait behind a long one; what they leave is the oldest's again.
    """
    shares = [0] * len(to_do)
    shares[0] = min(to_do[0], budget // 2)
    left = budget - shares[0]
    for index in sorted(range(1, len(to_do)), key=to_do.__getitem__):
        shares[index] = min(to_do[index], left)
        left -= shares[index]
    shares[0] = min(to_do[0], shares[0] + left)
    return shares
