"""The annotation application as processes that may be killed: a parent that has loaded everything forks them quickly.

    python -m tests.apps.feedback_server DATABASE CLOCK PORT

Each line on standard input starts an application, which then writes a line of JSON: its process id and its address.
CLOCK is a file that holds how many seconds its clocks are ahead.
"""

import json
import os
import signal
import sys
from datetime import datetime, timedelta
from pathlib import Path

from groundup.feedback.app import create_app
from groundup.feedback.clock import utc_now
from groundup.feedback.settings import AnnotateConfig
from groundup.web.run import serve_app


def serve(database: str, clock_file: Path, port: int) -> None:
    def clock() -> datetime:
        return utc_now() + timedelta(seconds=float(clock_file.read_text() or 0))

    def on_started(url: str) -> None:
        print(json.dumps({"pid": os.getpid(), "url": url}), flush=True)

    serve_app(create_app(AnnotateConfig(database=database), clock), "127.0.0.1", port, on_started=on_started)


def main() -> None:
    database, clock_file, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the killed
    for _ in sys.stdin:
        if os.fork() == 0:
            serve(database, clock_file, port)
            os._exit(0)


if __name__ == "__main__":
    main()
