"""A tiny recipe through the real command line: full run, skipping, overrides, kill -9 and resume, bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from groundup import cli
from groundup.base.artifacts import open_artifact

ARTIFACTS = ["corpus", "tokenizer", "shards", "base", "sft-v1", "sft-v2", "report"]
NOUNS = ("dog", "cat", "bird", "river", "tree", "house", "boat", "child", "king", "farmer", "stone", "cloud", "song")
VERBS = ("sees", "likes", "finds", "follows", "carries", "paints", "hears", "leaves", "builds", "remembers")
ADJECTIVES = ("small", "old", "quiet", "green", "happy", "broken", "bright", "cold", "gentle", "strange")
PLACES = ["by the sea", "in the forest", "near the old mill", "under the moon", "on the hill", "at the market"]

RECIPE = """
name: tiny
seed: 3
curate:
  sources: {texts}
  languages: []
  quality: null
  near_duplicate_threshold: null
  held_out_fraction: 0.1
tokenizer: {{vocab_size: 400}}
shards: {{}}
pretrain:
  model: {{preset: 260k, dim: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2}}
  steps: 6
  batch_rows: 4
  micro_rows: 2
  seq_len: 64
  lr: 0.01
  compile: "off"
  evaluate_every_steps: 3
  evaluate_rows: 4
  sample_tokens: 8
  checkpoint_every_steps: 2
sft_v1: &sft
  dialogues: {dialogues}
  steps: 2
  batch_rows: 2
  micro_rows: 2
  seq_len: 64
  compile: "off"
  sample_tokens: 8
sft_v2: *sft
report:
  prompts: ["What is a river?"]
  max_new_tokens: 8
"""


def write_texts(folder: Path, seed: int, num_files: int = 8, num_sentences: int = 400) -> Path:
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(num_files):
        sentences = [
            f"The {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(ADJECTIVES)} "
            f"{draw.choice(NOUNS)} {draw.choice(PLACES)}."
            for _ in range(num_sentences)
        ]
        paragraphs = [" ".join(sentences[i : i + 5]) for i in range(0, num_sentences, 5)]
        (folder / f"{number}.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    return folder


def write_dialogues(path: Path, word: str) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {word} {n}."},
                {"role": "assistant", "content": f"{word} {n}!"},
            ]
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path) -> Path:
    texts, dialogues = write_texts(folder / "texts", 1), write_dialogues(folder / "dialogues.jsonl", "hello")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE.format(texts=texts, dialogues=dialogues), encoding="utf-8")
    return recipe


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_recipe(folder)
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from groundup.cli import main; main()", *map(str, arguments)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def groundup(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, env=environment())


@pytest.fixture(scope="module")
def finished(workplace: Path) -> tuple[Path, str, str]:
    """A finished run: its folder, and what it said on standard output and standard error."""
    out = workplace / "out"
    done = groundup("run", workplace / "tiny.yaml", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, done.stderr


def ids(out: Path) -> dict[str, str]:
    """Artifact -> id; the report shows times, so it is left out."""
    return {name: open_artifact(out / name, verify=True).id for name in ARTIFACTS[:-1]}


def test_full_run(finished: tuple[Path, str, str]) -> None:
    out, stdout, stderr = finished
    assert stdout.strip().splitlines()[-1] == str(out / "report" / "index.html")
    assert "parameters" in stderr.splitlines()[0], "the plan comes first"
    for number, key in enumerate(["curate", "tokenizer", "shards", "pretrain", "sft_v1", "sft_v2", "report"], 1):
        assert f"[{number}/7] {key}: finished in" in stderr
    assert "user: What is a river?" in stderr
    assert not (out / ".work").exists()
    base = open_artifact(out / "base", "model", verify=True)
    assert base.metrics["steps"] == 6
    assert base.manifest["cost"]["tokens"] == 6 * 4 * 64
    assert base.metrics["held_out_bits_per_byte"] > 0
    assert (out / "sft-v2" / "logs" / "metrics.jsonl").exists()
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 8
    assert "What is a river?" in page


def test_second_run_skips_everything(workplace: Path, finished: tuple[Path, str, str]) -> None:
    out = finished[0]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    done = groundup("run", workplace / "tiny.yaml", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(": unchanged, skipped") == 7
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert before == after


def call(*arguments: object) -> tuple[int, str]:
    """The same command line inside this process: exit status, and everything it said."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_until_then_one_stage_then_all(workplace: Path, finished: tuple[Path, str, str], tmp_path: Path) -> None:
    recipe = workplace / "tiny.yaml"
    status, _ = call("run", recipe, "--out", tmp_path / "out", "--until", "tokenizer")
    assert status == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("[a-z]*")) == ["corpus", "tokenizer"]
    status, output = call("shards", recipe, "--out", tmp_path / "out")
    assert (status, output.splitlines()[-1]) == (0, str(tmp_path / "out" / "shards"))
    status, _ = call("sft", recipe, "--out", tmp_path / "out")
    assert status == 2, "its base model has not been made"
    for stage in ("pretrain", "sft"):
        assert call(stage, recipe, "--out", tmp_path / "out")[0] == 0
    assert ids(tmp_path / "out") == ids(finished[0]), "stage by stage gives what one run gives"


def test_override_with_own_text_and_dialogues(workplace: Path, finished: tuple[Path, str, str], tmp_path: Path) -> None:
    texts, dialogues = write_texts(tmp_path / "mine", 2), write_dialogues(tmp_path / "mine.jsonl", "tree")
    overrides = [f"curate.sources={texts}", f"sft_v2.dialogues={dialogues}", "pretrain.steps=2"]
    status, _ = call("run", workplace / "tiny.yaml", "--out", tmp_path / "out", *overrides)
    assert status == 0
    mine, theirs = ids(tmp_path / "out"), ids(finished[0])
    assert all(mine[name] != theirs[name] for name in mine)
    assert open_artifact(tmp_path / "out" / "base").metrics["steps"] == 2
    status, tree = call("lineage", tmp_path / "out" / "sft-v2")
    assert status == 0
    assert "mine.jsonl" in tree.replace("\n", "")


def test_chat_models_are_used_by_the_other_commands(
    workplace: Path, finished: tuple[Path, str, str], tmp_path: Path
) -> None:
    out = finished[0]
    arguments = ["--prompt", "Say hello 3.", "--max-new-tokens", 8, "--temperature", 0]
    status, answer = call("generate", out, *arguments)
    assert status == 0
    status, _ = call("convert", out / "sft-v2", tmp_path / "model.gguf", "--to", "gguf", "--quantisation", "f32")
    assert status == 0
    assert call("generate", tmp_path / "model.gguf", *arguments)[1].splitlines()[-1] == answer.splitlines()[-1]
    status, shown = call("show-batch", workplace / "tiny.yaml", "sft-v1", "--out", out, "--rows", 1)
    assert status == 0
    assert "[INST] Say hello" in shown
    status, shown = call("show-batch", workplace / "tiny.yaml", "pretrain", "--out", out)
    assert status == 0
    assert "64 tokens" in shown
    status, plan = call("plan", workplace / "tiny.yaml", "--out", out)
    assert status == 0
    assert plan.count("finished") == 7


def test_chat_over_a_pipe(finished: tuple[Path, str, str]) -> None:
    done = subprocess.run(
        command("chat", finished[0], "--max-new-tokens", 4, "--seed", 1),
        input="Say hello 1.\nSay hello 2.\n", capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tokens/s") == 2
    assert done.stdout.count("\n") >= 2


def test_kill_9_in_training_and_resume(workplace: Path, tmp_path: Path) -> None:
    """Killed at several moments of pre-training and fine-tuning, the run ends with the ids of one left alone."""
    overrides = ["pretrain.steps=40", "sft_v1.steps=20", "sft_v1.checkpoint_every_steps=2"]
    alone = groundup("run", workplace / "tiny.yaml", "--out", tmp_path / "alone", *overrides)
    assert alone.returncode == 0, alone.stderr
    out = tmp_path / "killed"
    for stage, wait_seconds in (("base", 0.2), ("sft-v1", 0.1)):
        with subprocess.Popen(
            command("run", workplace / "tiny.yaml", "--out", out, *overrides),
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment(),
        ) as process:  # fmt: skip
            deadline = time.monotonic() + 120
            pattern = f".work/{stage}-*/checkpoints/*"
            while process.poll() is None and not any(out.glob(pattern)) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(wait_seconds)
            process.send_signal(signal.SIGKILL)
        assert not (out / "report").exists()
    assert list(out.glob(".work/*")), "something was left to go on from"
    done = groundup("run", workplace / "tiny.yaml", "--out", out, *overrides)
    assert done.returncode == 0, done.stderr
    assert ids(out) == ids(tmp_path / "alone")
    assert not (out / ".work").exists()


def test_interrupt_says_how_to_go_on(workplace: Path, finished: tuple[Path, str, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "out")
    with subprocess.Popen(
        command("run", workplace / "tiny.yaml", "--out", tmp_path / "out", "pretrain.steps=100000"),
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment(),
        # Shells start what runs in the background with this signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        for line in process.stderr:
            if "pretrain: started" in line:
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "run the same command to go on" in rest
    assert "Traceback" not in rest


def test_disk_full_while_writing(workplace: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 150 kB: the model does not fit, what was made before stays whole."""
    limited = textwrap.dedent("""
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        from groundup.cli import main
        main()
    """)
    out = tmp_path / "out"
    arguments = ["run", str(workplace / "tiny.yaml"), "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "run the same command" in done.stderr
    assert "Traceback" not in done.stderr
    made = [name for name in ARTIFACTS if (out / name).exists()]
    assert made
    assert "report" not in made
    for name in made:
        open_artifact(out / name, verify=True)
    assert not [path for path in out.iterdir() if path.name.endswith(".new")]


def one_message(status: int, output: str, *words: str) -> None:
    assert status == 2, output
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    flat = " ".join(output.split())
    for word in words:
        assert word in flat, f"{word!r} is not in {output!r}"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["pretrain.stepz=3"], ["unknown key 'pretrain.stepz'", "did you mean 'steps'?"]),
        (["sftv1.lr=1"], ["unknown key 'sftv1'", "did you mean 'sft_v1'?"]),
        (["pretrain.steps=many"], ["pretrain.steps = 'many'"]),
        (["pretrain.steps"], ["override 'pretrain.steps' has no '='"]),
        (["sft_v2.dialogues=/nowhere.jsonl"], ["/nowhere.jsonl: no such file"]),
        (["curate.sources=/nowhere"], ["/nowhere"]),
        (["curate.sources=EMPTY"], ["no text is left"]),
        (["curate.sources=LATIN"], ["UTF-8"]),
        (["tokenizer.vocab_size=100000"], ["vocab_size 100000"]),
        (["pretrain.model=9b"], ["unknown model preset '9b'"]),
        (["import.source=x"], ["pretrain and import both make the base model"]),
        (["sft_v1.seq_len=512", "--until", "sft-v1"], ["seq_len = 512 exceeds the model's context of 64 tokens"]),
        (["--until", "bass"], ["--until bass", "it makes corpus, tokenizer"]),
    ],
)
def test_bad_input_is_one_message(
    workplace: Path, finished: tuple[Path, str, str], tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "a.txt").write_bytes("Der kleine Bär läuft über die Brücke. ".encode("latin-1") * 30)
    places = {"EMPTY": tmp_path / "empty", "LATIN": tmp_path / "latin"}
    arguments = [word.replace(key, str(path)) for word in overrides for key, path in places.items() if key in word]
    out = finished[0] if "sft-v1" in overrides else tmp_path / "out"
    before = ids(finished[0])
    one_message(*call("run", workplace / "tiny.yaml", "--out", out, *(arguments or overrides)), *words)
    assert ids(finished[0]) == before, "nothing already made is lost"


def test_missing_recipe_and_models(workplace: Path, finished: tuple[Path, str, str], tmp_path: Path) -> None:
    one_message(*call("run", tmp_path / "no.yaml"), "no.yaml: no such file")
    one_message(*call("generate", tmp_path / "nothing", "--prompt", "x"), "nothing: no such file or folder")
    one_message(*call("generate", finished[0], "--prompt", "river " * 200), "context", "shorten the prompt")
    one_message(*call("lineage", tmp_path / "nothing"), "no such run or artifact")


def test_truncated_model_is_named(workplace: Path, finished: tuple[Path, str, str], tmp_path: Path) -> None:
    shutil.copytree(finished[0], tmp_path / "out")
    weights = tmp_path / "out" / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    one_message(*call("generate", tmp_path / "out" / "base", "--prompt", "x"), "model.safetensors: 1000 bytes")
    overrides = ["sft_v1.steps=3"]
    one_message(
        *call("run", workplace / "tiny.yaml", "--out", tmp_path / "out", *overrides),
        "model.safetensors: 1000 bytes", f"delete {tmp_path / 'out' / 'base'}",
    )  # fmt: skip
    shutil.rmtree(tmp_path / "out" / "base")
    assert call("run", workplace / "tiny.yaml", "--out", tmp_path / "out", *overrides)[0] == 0
    assert ids(tmp_path / "out")["base"] == ids(finished[0])["base"]


def test_import_of_a_model_and_fine_tuning(finished: tuple[Path, str, str], tmp_path: Path) -> None:
    base, dialogues = finished[0] / "base", write_dialogues(tmp_path / "d.jsonl", "song")
    recipe = tmp_path / "import.yaml"
    recipe.write_text(
        f"name: imported\nimport: {{source: {base}, dtype: float32}}\nsft_v1: {{dialogues: {dialogues}, steps: 1, "
        "batch_rows: 2, micro_rows: 2, seq_len: 64, compile: 'off'}\nreport: {prompts: []}\n"
    )
    status, _ = call("run", recipe, "--out", tmp_path / "out")
    assert status == 0
    imported = open_artifact(tmp_path / "out" / "base", "model", verify=True)
    weights = "model.safetensors"
    assert imported.manifest["files"][weights] == open_artifact(base).manifest["files"][weights], "bit for bit"
    status, tree = call("lineage", tmp_path / "out")
    assert "texts" in tree.replace("\n", ""), "another run's artifact is followed back to its raw text"
    one_message(
        *call("run", recipe, "--out", tmp_path / "other", "import.source=smollm2-135m"), "did you mean 'smollm2"
    )


@pytest.mark.slow
def test_two_ranks_under_torchrun(workplace: Path, finished: tuple[Path, str, str], tmp_path: Path) -> None:
    """Rank 0 alone makes what is not training; losses equal those of one process up to the order of sums."""
    arguments = [
        "--nproc_per_node",
        "2",
        "-m",
        "groundup.cli",
        "run",
        workplace / "tiny.yaml",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[1/7] curate: finished") == 1
    theirs, alone = ids(tmp_path / "out"), ids(finished[0])
    assert [theirs[name] == alone[name] for name in ARTIFACTS[:3]] == [True] * 3
    losses = [open_artifact(out / "base").metrics["loss"] for out in (tmp_path / "out", finished[0])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert not (tmp_path / "out" / ".work").exists()
