"""One tireless annotator over real HTTP, as a process without the package: it knows addresses, a cookie and a token.

    python feedback_annotator.py PORT PROJECT SESSION CSRF SEED ABANDON CLOCK STOP LOG

It takes tasks and answers them until the file STOP appears. It walks away from a share ABANDON of its tasks: it turns
the clock past all leases, everybody's, and goes on. Every tenth answer is sent twice. A connection that breaks is
tried again with the same key. LOG gets a line of JSON for everything that the server acknowledged or refused.
"""

import fcntl
import http.client
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

PAST_ALL_LEASES_SECONDS = 1801


class Annotator:
    def __init__(self, argv: list[str]) -> None:
        port, self.project, session, csrf, seed, abandon, clock, stop, log = argv
        self.port = int(port)
        self.headers = {
            "cookie": f"groundup_session={session}",
            "x-csrf-token": csrf,
            "content-type": "application/json",
        }
        self.seed, self.random, self.abandon = seed, random.Random(seed), float(abandon)
        self.clock, self.stop = Path(clock), Path(stop)
        self.log = Path(log)
        self.connection: http.client.HTTPConnection | None = None
        self.sent = 0

    def post(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str, str]:
        """Status, location and body; tried again until the server answers."""
        while not self.stop.exists():
            try:
                if self.connection is None:
                    self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
                self.connection.request("POST", path, json.dumps(body or {}), self.headers)
                answer = self.connection.getresponse()
                return answer.status, answer.headers.get("location", ""), answer.read().decode()
            except (OSError, http.client.HTTPException):
                self.connection = None
                time.sleep(0.02)
        sys.exit(0)

    def note(self, **what: Any) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def walk_away(self) -> None:
        with self.clock.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            ahead = float(file.read() or 0) + PAST_ALL_LEASES_SECONDS
            file.seek(0)
            file.write(str(ahead))

    def work(self) -> None:
        while True:
            status, location, text = self.post(f"/projects/{self.project}/next")
            if status != 303:
                self.note(event="refused claim", status=status, text=text)
            elif not location.startswith("/tasks/"):
                time.sleep(0.1)
            elif self.random.random() < self.abandon:
                self.walk_away()
            else:
                self.answer(location)

    def answer(self, task: str) -> None:
        self.sent += 1
        key = f"{self.seed}-{self.sent:08}-of-this-form"
        body = {"version": 1, "key": key, "answer": {"winner": 0, "rating": "better", "reason": key}}
        for _ in range(2 if self.sent % 10 == 0 else 1):
            status, _, text = self.post(f"{task}/submit", body)
            self.note(event="acknowledged" if status == 200 else "refused answer", status=status, key=key, text=text)


if __name__ == "__main__":
    Annotator(sys.argv[1:]).work()
