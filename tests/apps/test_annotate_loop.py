"""From people to a reward model and back: both ways in which a run gets comparisons from people."""

import io
import zipfile
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, expect
from tests.apps.annotation import Annotation, annotation, asked, begin, choose, press, running
from tests.apps.small_model import WORDS, save_small_model
from typer.testing import CliRunner

from groundup import cli
from groundup.base.artifacts import open_artifact
from groundup.base.records import Comparison, read_jsonl
from groundup.data.comparisons import HELD_OUT_FILE, TRAIN_FILE
from groundup.feedback.accounts import Account
from groundup.feedback.handover import Handovers
from groundup.model.checkpoint import load_checkpoint, save_checkpoint
from groundup.serve.app import create_app
from groundup.serve.config import ServeConfig
from groundup.serve.run import EngineOptions, open_backend

RECIPE = """
name: loop
seed: 1
import: {{source: {model}, dtype: float32}}
prompts: {{sources: [{{source: {prompts}}}], held_out_fraction: 0.1}}
rounds: {{count: 1}}
collect: {collect}
reward_helpful: {{epochs: 1, batch_rows: 4, micro_rows: 4, seq_len: 128, lr: 0.001, precision: fp32, compile: "off"}}
rejection: {{num_prompts: 3, num_samples: 16, max_new_tokens: 24, temperatures: [1.0]}}
"""
HUMAN = (
    "{judge: human, %shelpfulness: 8, safety: 0, temperatures: [0.7, 1.3], max_new_tokens: 8, held_out_fraction: 0.3}"
)
BETTER = {"winner": 0, "rating": "better"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of a model that likes to end its answers, and prompts."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("old", "new")):
        checkpoint = load_checkpoint(save_small_model(folder / f"endless-{name}", seed))
        with torch.no_grad():
            head = checkpoint.model.head_weight
            head[checkpoint.tokenizer.eos_id] += 40 * head.mean(0)
        save_checkpoint(folder / name, checkpoint)
    words = sorted(set(WORDS.split()))
    (folder / "prompts.txt").write_text("".join(f"the {word}?\n" for word in words))
    return folder


def run(made: Path, folder: Path, collect: str) -> tuple[int, str]:
    """`groundup run`, and what it said in one line."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=made / "new", prompts=made / "prompts.txt", collect=collect))
    result = CliRunner().invoke(cli.app, ["run", str(recipe), "--out", str(folder / "run")])
    return result.exit_code, " ".join(result.output.split())


def used_in_the_next_round(out: Path, annotators: set[str]) -> None:
    """The reward model learned from these people, and best-of-K of the round was chosen by it."""
    comparisons = open_artifact(out / "comparisons-1", "comparisons", verify=True)
    rows = [
        Comparison.from_json(row)
        for name in (TRAIN_FILE, HELD_OUT_FILE)
        for row in read_jsonl(out / "comparisons-1" / name)
    ]
    assert {row.annotator for row in rows} == annotators
    assert comparisons.metrics["kept"]["helpfulness"] == len(rows) > 3
    reward = open_artifact(out / "rm-helpful-1", "reward model", verify=True)
    assert reward.manifest["inputs"]["comparisons-1"]["id"] == comparisons.id
    assert reward.metrics["steps"] > 0
    samples = open_artifact(out / "samples-1", "samples", verify=True)
    assert samples.manifest["inputs"]["rm_helpful"]["id"] == reward.id


def rate_all(world: Annotation, person: Account) -> int:
    """Over HTTP, as a browser would: until no project has anything left."""
    done = 0
    with world.client(person.name) as client:
        for project in world.services.projects.projects():
            while (answer := client.post(f"/projects/{project.id}/next")).headers["location"].startswith("/tasks/"):
                body = {"version": 1, "key": f"key-of-rating-{done:06}", "answer": BETTER}
                sent = client.post(f"{answer.headers['location']}/submit", json=body)
                assert sent.status_code == 200, sent.text
                done += 1
    return done


@pytest.mark.parametrize("place", ["run", "people"])
def test_a_run_stops_for_people_and_goes_on_when_they_are_done(made: Path, tmp_path: Path, place: str) -> None:
    """With what people are to rate inside the run, and in a folder of its own."""
    people = tmp_path / place
    human = HUMAN % (f"annotation_folder: {people}, " if place == "people" else "")
    status, said = run(made, tmp_path, human)
    assert status == 2
    assert "0 of 8 comparisons are rated" in said
    assert "start `groundup annotate --handover" in said
    with annotation(tmp_path) as world:
        services = world.services
        handovers = Handovers(services.database, services.projects, [people])
        world.app.state.handovers = handovers
        ann = world.person("ann")
        handovers.look(world.url)
        _, said = run(made, tmp_path, human)
        assert f"rate the others at {world.url}" in said, "the address is told"
        with world.client("admin") as client:
            assert "0 of 8 are handed back" in " ".join(client.get("/admin").text.split())
        assert rate_all(world, ann) == 8
        handovers.look(world.url)
    status, said = run(made, tmp_path, human)
    assert status == 0, said
    used_in_the_next_round(tmp_path / "run", {f"human:{ann.pseudonym}"})
    status, said = run(made, tmp_path, human)
    assert (status, said.count("unchanged, skipped")) == (0, 5)


@pytest.mark.slow
def test_two_served_versions_compared_in_the_browser_make_a_reward_model(
    made: Path, tmp_path: Path, browser: Browser
) -> None:
    options = EngineOptions(slots=2, queue=8)
    models = {name: open_backend(name, made / name, options) for name in ("old", "new")}
    with running(create_app(models, ServeConfig())) as models_url, annotation(tmp_path) as world:
        projects, ann = world.services.projects, world.person("ann")
        endpoints = [
            projects.create_endpoint(
                world.admin, name=name, base_url=f"{models_url}/v1", model=name, revision=f"rev-{name}",
                min_temperature=0.5, max_temperature=1.5, max_new_tokens=10,
            ).id
            for name in models
        ]  # fmt: skip
        prompts = (made / "prompts.txt").read_text().split("\n")[:8]
        project = world.project("people", "preference", [asked(prompt) for prompt in prompts], endpoint_ids=endpoints)
        with world.page(browser, "ann") as (page, noticed):
            for number in range(len(prompts)):
                begin(page, world, project)
                press(page, "Control+Enter")
                choose(page)
                task = page.url
                press(page, "1" if number % 2 else "8", "f")
                expect(page).not_to_have_url(task)
            assert noticed.nothing(), noticed
        assert len(world.answers(project)) == len(prompts)
        with world.client("admin") as client:
            archive = client.get(f"/admin/projects/{project.id}/export", params={"held_out": 0})
    assert archive.headers["content-type"] == "application/zip"
    zipfile.ZipFile(io.BytesIO(archive.content)).extractall(tmp_path / "export")
    export = open_artifact(tmp_path / "export" / "people", "comparisons", verify=True)
    rows = [Comparison.from_json(row) for row in read_jsonl(export.file(TRAIN_FILE))]
    assert {row.chosen.model for row in rows} | {row.rejected.model for row in rows} == {"old", "new"}
    assert all(sorted(row.metadata["revisions"]) == ["rev-new", "rev-old"] for row in rows)
    assert all(0.5 <= side.temperature <= 1.5 for row in rows for side in (row.chosen, row.rejected))
    status, said = run(made, tmp_path, f"{{judge: import, comparisons: [{export.path}], held_out_fraction: 0.3}}")
    assert status == 0, said
    used_in_the_next_round(tmp_path / "run", {ann.pseudonym})
