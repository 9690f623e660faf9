"""The export as administrators get it: by the page, and by the command line while the application runs."""

import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.apps.annotation import Annotation, annotation, pair
from typer.testing import CliRunner

from groundup import cli
from groundup.base.artifacts import open_artifact
from groundup.data.comparisons import read_comparisons
from groundup.feedback.tables import Project

NAME = '../../etc "x" <b> Ünï'


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Annotation]:
    with annotation(tmp_path_factory.mktemp("export")) as world:
        ann = world.person("ann")
        world.person("rita", "reviewer")
        project = world.project(NAME, "preference", [pair(f"one {n}", f"two {n}") for n in range(4)])
        while (task := world.services.work.claim(ann.id, project.id)) is not None:
            key = f"key-of-answer-{task.assignment_id:06}"
            answer = {"winner": 0, "rating": "better"}
            world.services.work.submit(ann.id, task.assignment_id, task.version, key, answer)
        yield world


def project_of(world: Annotation) -> Project:
    return next(project for project in world.services.projects.projects() if project.name == NAME)


def folder_of(world: Annotation) -> Path:
    return Path(world.services.config.database).parent


def call(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["annotate", *arguments])
    return result.exit_code, result.output


def test_the_page_and_the_command_line_give_the_same_export(
    world: Annotation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with world.client("admin") as client:
        answer = client.get(f"/admin/projects/{project_of(world).id}/export", params={"held_out": 0.2})
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == 'attachment; filename="etc-x-b-n.zip"'
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert all(name.startswith("etc-x-b-n/") for name in archive.namelist())
        archive.extractall(tmp_path)
    assert list(temporary.iterdir()) == [], "nothing is left on the server"
    by_page = open_artifact(tmp_path / "etc-x-b-n", "comparisons", verify=True)
    data, out = str(folder_of(world)), tmp_path / "by-command"
    arguments = ("--project", NAME, "--out", str(out), "--held-out", "0.2", "--data", data)
    status, said = call("export", *arguments)
    assert status == 0, said
    assert "submissions: 4" in said
    assert open_artifact(out).id == by_page.id
    assert len(list(read_comparisons(out / "train.jsonl"))) == by_page.metrics["train"] > 0


@pytest.mark.parametrize("name", ["ann", "rita", None])
def test_nobody_else_gets_it(world: Annotation, name: str | None) -> None:
    with world.client(name) as client:
        answer = client.get(f"/admin/projects/{project_of(world).id}/export")
    assert answer.status_code in (401, 403)
    assert b"PK" not in answer.content


@pytest.mark.parametrize("share", ["1", "-0.1", "nan", "much"])
def test_a_share_that_is_none_is_refused(world: Annotation, share: str) -> None:
    with world.client("admin") as client:
        answer = client.get(f"/admin/projects/{project_of(world).id}/export", params={"held_out": share})
    assert answer.status_code == 422


def test_prompts_and_whole_projects_by_the_command_line(world: Annotation, tmp_path: Path) -> None:
    data = str(folder_of(world))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is rain?\nWhat is snow?\n")
    status, said = call("import", str(prompts), "--project", NAME, "--new-batch", "--data", data)
    assert status == 0, said
    assert "2 items added to batch 2, 0 were there already" in said
    status, said = call("import", str(prompts), "--project", NAME, "--data", data)
    assert "0 items added to batch 2, 2 were there already" in said
    assert call("export", "--project", NAME, "--out", str(tmp_path / "out"), "--data", data)[0] == 0
    status, said = call("import", str(tmp_path / "out"), "--data", str(tmp_path))
    assert status == 0, said
    assert "6 items, 4 answers, 1 people" in said
    assert call("export", "--project", NAME, "--out", str(tmp_path / "again"), "--data", str(tmp_path))[0] == 0
    assert open_artifact(tmp_path / "again").id == open_artifact(tmp_path / "out").id


def test_mistakes_at_the_command_line_are_told(world: Annotation, tmp_path: Path) -> None:
    data = str(folder_of(world))
    for arguments, words in (
        (("export", "--project", "none", "--out", str(tmp_path / "x"), "--data", data), "no project is called 'none'"),
        (("export", "--project", NAME, "--out", str(tmp_path / "x"), "--data", str(tmp_path)), "no such database"),
        (("import", str(tmp_path / "none.txt"), "--project", NAME, "--data", data), "no such file"),
        (("import", "adv-bench", "--data", data), "which project are these items for?"),
        (("--port", "0", "export", "--project", NAME, "--out", "x"), "stand before its subcommand"),
    ):
        status, said = call(*arguments)
        assert status == 2
        assert words in " ".join(said.split()), said
    assert list(tmp_path.iterdir()) == []
