"""`groundup annotate` as a process: the first administrator's link, and what a second start says."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from tests.apps.annotation import csrf_of
from tests.apps.feedback_world import PASSWORD

LINK = re.compile(r"http://127\.0\.0\.1:\d+/invitations/[\w-]{40,}")


@contextmanager
def started(folder: Path, count: int) -> Iterator[list[str]]:
    """The first `count` lines that the command prints; ended by SIGTERM, which must end it well."""
    command = [sys.executable, "-m", "groundup.cli", "annotate", "--data", str(folder / "new" / "data"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip() for _ in range(count)]
            yield lines
        finally:
            process.send_signal(signal.SIGTERM)
            rest, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert rest == ""
        assert PASSWORD not in errors
        assert "invitations/" not in errors


def test_the_first_start_prints_a_link_that_works_once(tmp_path: Path) -> None:
    with started(tmp_path, 2) as lines:
        url = lines[0].removeprefix("Annotation at ")
        found = LINK.search(lines[1])
        assert found, lines
        assert found[0].startswith(url)
        form = {"name": "boss", "password": PASSWORD, "again": PASSWORD}
        with httpx.Client() as client:
            assert client.get(f"{url}/").status_code == 401
            form["csrf_token"] = csrf_of(client.get(found[0]).text)
            assert client.post(found[0], data={**form, "password": "short", "again": "short"}).status_code == 422
            assert client.post(found[0], data={**form, "again": "another password"}).status_code == 422
            made = client.post(found[0], data=form)
            assert (made.status_code, made.headers["location"]) == (303, "/")
            assert "Administration" in client.get(f"{url}/").text
            assert client.get(found[0]).status_code == 404, "it works once"
    with started(tmp_path, 1) as lines:
        url = lines[0].removeprefix("Annotation at ")
        with httpx.Client() as client:
            token = csrf_of(client.get(f"{url}/login").text)
            data = {"name": "boss", "password": PASSWORD, "csrf_token": token}
            assert client.post(f"{url}/login", data=data).status_code == 303
