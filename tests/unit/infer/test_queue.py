"""Who is let in next: fairness between groups, no starvation, cancellation."""

from collections import Counter
from typing import Any

from groundup.base.generation import SamplingParams
from groundup.infer.queue import FairQueue, share_out
from groundup.infer.response import Response
from groundup.infer.text import ResponseText


def response(request: int, sample: int = 0, group: Any = None) -> Response:
    params = SamplingParams()
    text = ResponseText(None, ())  # type: ignore[arg-type]
    return Response(request, sample, group or request, [1], params, 9, 0, text, is_streamed=True)


def test_one_request_is_first_come_first_served() -> None:
    queue = FairQueue()
    queue.push(response(1, sample) for sample in range(5))
    assert [queue.pop().sample for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(queue) == 0


def test_a_single_response_does_not_wait_for_all_samples_of_an_earlier_request() -> None:
    queue = FairQueue()
    queue.push(response(1, sample) for sample in range(16))
    running = [queue.pop() for _ in range(4)]
    queue.push([response(2)])
    queue.leave(running[0])
    assert queue.pop().request_id == 2


def test_slots_are_shared_evenly_and_nobody_starves() -> None:
    queue = FairQueue()
    for request in (1, 2, 3):
        queue.push(response(request, sample) for sample in range(20))
    running = [queue.pop() for _ in range(6)]
    assert Counter(r.request_id for r in running) == {1: 2, 2: 2, 3: 2}
    # New requests keep coming, one for each response that ends: the old ones still get on.
    served: Counter[int] = Counter()
    for turn in range(200):
        queue.push([response(100 + turn)])
        ended = running.pop(0)
        queue.leave(ended)
        running.append(queue.pop())
        served[min(running[-1].request_id, 100)] += 1
    assert all(served[request] >= 4 for request in (1, 2, 3))
    assert served[100] > 100


def test_requests_of_one_group_count_as_one() -> None:
    queue = FairQueue()
    for request in range(8):
        queue.push([response(request, group="list")])
    running = [queue.pop() for _ in range(4)]
    queue.push([response(50), response(51)])
    queue.leave(running[0])
    assert queue.pop().request_id == 50


def test_what_is_cancelled_leaves_the_line() -> None:
    queue = FairQueue()
    for request in (1, 2):
        queue.push(response(request, sample, group="same") for sample in range(3))
    assert {r.request_id for r in queue.remove({1, 7})} == {1}
    assert len(queue) == 3
    assert queue.pop().request_id == 2
    queue.remove({2})
    assert len(queue) == 0
    assert queue.remove({2}) == []


def test_half_of_a_chunk_is_the_oldest_prompts_and_the_rest_the_shortest() -> None:
    assert share_out([10], 64) == [10]
    assert share_out([1000], 64) == [64]
    assert share_out([1000, 900, 20], 64) == [32, 12, 20]
    assert share_out([1000, 8, 9], 64) == [47, 8, 9]
    assert share_out([5, 1000, 1000], 64) == [5, 59, 0]
    assert share_out([100, 100, 100], 2) == [1, 1, 0]
