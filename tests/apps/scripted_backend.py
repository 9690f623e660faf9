"""A `Backend` that answers what the question tells it to: for tests that need known answers, at known times."""

import asyncio
import math
import re
import threading
from collections.abc import AsyncIterator, Hashable, Sequence

from tests.apps.fake_backend import FakeBackend

from groundup.base.generation import Delta, FinishReason, SamplingParams
from groundup.serve.backend import Overloaded, RequestFailed

PROBABILITIES = (0.97, 0.8, 0.55, 0.35, 0.2, 0.05)


class ScriptedBackend(FakeBackend):
    """By the question's first word:

    say: the rest of the question. wait: that and the model's name, the second half of it once `gate` is set.
    long: words without an end.
    busy: refused once, then as say. fail: an error after a few words. payload N: `payloads[N]`.
    Anything else: the model's name and the question.
    """

    payloads: Sequence[str] = ()

    def start(
        self, prompt: Sequence[int], params: SamplingParams, group: Hashable | None = None
    ) -> AsyncIterator[Delta]:
        self.gate = getattr(self, "gate", threading.Event())
        self.refused = getattr(self, "refused", set[str]())
        self.params.append(params)
        self.prompts.append(list(prompt))
        question = self.questions[-1]
        if question.startswith("busy") and question not in self.refused:
            self.refused.add(question)
            raise Overloaded(1)
        return self._answers(question, params)

    @property
    def questions(self) -> list[str]:
        """The last question of every request so far."""
        turns = [self.tokenizer.decode(prompt).split("[INST]")[-1].split("[/INST]")[0] for prompt in self.prompts]
        return [re.sub(r"(?s)^\s*<<SYS>>.*<</SYS>>", "", turn).strip() for turn in turns]

    async def _answers(self, question: str, params: SamplingParams) -> AsyncIterator[Delta]:
        self.num_open += 1
        try:
            word, _, rest = question.partition(" ")
            pieces = re.findall(r"\s*\S+|\s+$", self._text(word, rest, question))
            finish: FinishReason = "stop" if len(pieces) <= params.max_new_tokens else "length"
            pieces = pieces[: params.max_new_tokens]
            for place, piece in enumerate(pieces):
                if word == "long":
                    await asyncio.sleep(0.01)
                while word == "wait" and place >= len(pieces) // 2 and not self.gate.is_set():
                    await asyncio.sleep(0.005)
                if word == "fail" and place == 3:
                    raise RequestFailed("the engine failed on this request")
                await asyncio.sleep(0)
                yield self._delta(piece, place, params, finish if place + 1 == len(pieces) else None)
        finally:
            self.num_open -= 1

    def _text(self, word: str, rest: str, question: str) -> str:
        if word == "wait":
            return f"{rest} from {self.name}"
        if word in ("say", "busy", "fail"):
            return rest
        if word == "long":
            return "word after word " * 10_000
        if word == "payload":
            return self.payloads[int(rest)]
        return f"{self.name} heard: {question}"

    def _delta(self, piece: str, place: int, params: SamplingParams, finish: FinishReason | None) -> Delta:
        ids = self.tokenizer.encode(piece)
        p = PROBABILITIES[place % len(PROBABILITIES)]
        logps = [math.log(p)] * len(ids) if params.want_logps else []
        others = [i for i in range(300, 320) if i not in ids]
        top = [[(token, math.log(p)), (others[0], math.log(0.02)), (others[1], math.log(0.01))] for token in ids]
        return Delta(0, 0, piece, ids, logps, finish, top if params.top_logps else [])
