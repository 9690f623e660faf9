"""The command line, nothing else: it names what the user wants, calls a stage, and turns mistakes into one message.

Nothing heavy is imported before a command runs, so that --help answers at once.
"""

import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from groundup.base.errors import UserError
from groundup.base.extras import need_extra
from groundup.base.progress import say
from groundup.serve.command import serve

if TYPE_CHECKING:
    from groundup.stages.pipeline import Pipeline

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DISK_FULL_WORDS = ("No space left on device", "File too large", "file write failed", "Disk quota exceeded")


class Commands(TyperGroup):
    """Runs a command; a mistake becomes one message and exit status 2, Ctrl-C becomes 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            say("interrupted; run the same command to go on")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output went away; nobody is left to tell
            raise typer.Exit(0) from None
        except Exception as error:
            message = _disk_message(error)
            if message is None:
                raise
            _fail(message)


def _fail(message: str) -> None:
    say(f"error: {message}")
    raise typer.Exit(2)


def _disk_message(error: BaseException) -> str | None:
    """What to tell about an error of the file system; None for any other error.

    Why: libraries wrap a full disk in exceptions of their own (safetensors, sentencepiece and torch do), so causes are
    followed and their words are read.
    """
    current: BaseException | None = error
    while current is not None:
        full = isinstance(current, OSError) and current.errno in DISK_FULL
        if full or any(words in str(current) for words in DISK_FULL_WORDS):
            where = getattr(current, "filename", None) or ", ".join(getattr(error, "__notes__", ["a file"]))
            return (
                f"{where}: the disk is full, or the file is larger than allowed ({current})\n"
                "  remedy: free some space and run the same command to go on; what is finished is kept"
            )
        current = current.__cause__ or current.__context__
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    return None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From raw text to a chat model, with the recipe of Llama 2.",
    epilog="Start with: groundup run recipes/quickstart.yaml, then: groundup chat runs/quickstart",
)
data_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Known sources of text, dialogues, preferences and models."
)
app.add_typer(data_app, name="data")
annotate_app = typer.Typer(rich_markup_mode=None)
app.add_typer(annotate_app, name="annotate")


RecipeArg = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/quickstart.yaml.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value]...", help="Values that replace the recipe's, e.g. pretrain.steps=100.", show_default=False
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Folder of the run (default: runs/NAME).", show_default=False),
]
ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A folder, a file, RUN/ARTIFACT, RUN, or a name from the catalogue.", show_default=False
    ),
]


def _pipeline(recipe: Path, overrides: list[str] | None, out: Path | None) -> "Pipeline":
    from groundup.stages.pipeline import Pipeline
    from groundup.stages.recipe import default_out, load_recipe

    loaded = load_recipe(recipe, overrides or [])
    return Pipeline(loaded, out or default_out(loaded))


@app.command(epilog="Example: groundup run recipes/quickstart.yaml --until base pretrain.steps=100")
def run(
    recipe: RecipeArg,
    overrides: Overrides = None,
    out: Out = None,
    until: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Stop after this artifact, e.g. base.", show_default=False)
    ] = None,
) -> None:
    """Run every stage of a recipe that is not finished; started again after a kill, it goes on."""
    from groundup.stages.pipeline import run_pipeline
    from groundup.stages.plan import show_short_plan
    from groundup.stages.resources import Rank

    pipeline = _pipeline(recipe, overrides, out)
    stages = pipeline.select(until)
    is_first = Rank.from_environment().is_first
    if is_first:
        show_short_plan(pipeline, stages)
    artifacts = run_pipeline(pipeline, stages)
    if is_first:
        last = artifacts[-1]
        typer.echo(last.path / "index.html" if last.kind == "report" else last.path)


@app.command(epilog="Example: groundup plan recipes/llama2-7b.yaml")
def plan(
    recipe: RecipeArg,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Parameters, FLOPs, memory, disk and time of each stage, from a short calibration on this machine."""
    from groundup.stages.plan import show_plan

    show_plan(_pipeline(recipe, overrides, out), as_json=as_json)


def _run_stages(recipe: Path, overrides: list[str] | None, out: Path | None, keys: tuple[str, ...]) -> None:
    from groundup.stages.pipeline import run_pipeline

    pipeline = _pipeline(recipe, overrides, out)
    stages = [stage for stage in pipeline.stages if stage.key in keys]
    if not stages:
        raise UserError(f"{recipe}: the recipe has no section {' or '.join(keys)}", f"add `{keys[0]}:` to it")
    for artifact in run_pipeline(pipeline, stages):
        typer.echo(artifact.path)


def _stage_command(name: str, keys: tuple[str, ...], text: str) -> None:
    def command(recipe: RecipeArg, overrides: Overrides = None, out: Out = None) -> None:
        _run_stages(recipe, overrides, out, keys)

    app.command(name, help=text, epilog=f"Example: groundup {name} recipes/quickstart.yaml --out runs/try")(command)


_stage_command("curate", ("curate",), "Stage: raw text -> corpus.")
_stage_command("tokenizer", ("tokenizer",), "Stage: corpus -> tokenizer.")
_stage_command("shards", ("shards",), "Stage: corpus and tokenizer -> token shards.")
_stage_command("pretrain", ("pretrain",), "Stage: token shards -> base model.")
_stage_command("import", ("import",), "Stage: a model that others trained -> base model.")
_stage_command("sft", ("sft_v1", "sft_v2"), "Stage: dialogues and base model -> chat model, both phases.")
_stage_command("sft-v1", ("sft_v1",), "Stage: the first, large phase of supervised fine-tuning.")
_stage_command("sft-v2", ("sft_v2",), "Stage: the second, small and clean phase of supervised fine-tuning.")
_stage_command("prompts", ("prompts",), "Stage: tasks and sets of prompts -> prompts for training and for evaluation.")
_stage_command("collect", ("collect",), "Stage: prompts and two model variants -> graded comparisons, every round's.")
_stage_command("reward", ("reward_helpful", "reward_safety"), "Stage: comparisons -> reward models, every round's.")
_stage_command("rejection", ("rejection",), "Stage: the best of K responses, every round's.")
_stage_command("tune", ("tune",), "Stage: fine-tuning on the best responses of all rounds so far.")
_stage_command("dpo", ("dpo",), "Stage: direct preference optimisation on the comparisons.")
_stage_command("ppo", ("ppo",), "Stage: PPO (or GRPO) on the last round's model.")
_stage_command("evaluate", ("evaluate",), "Stage: every version on held-out prompts, by judges that never trained.")
_stage_command("report", ("report",), "Stage: everything a run made -> one HTML page.")


Prompt = Annotated[str, typer.Option("--prompt", help="What to say, or to continue with --raw.", show_default=False)]
System = Annotated[str | None, typer.Option("--system", help="System message.", show_default=False)]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0: the most likely token each time.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the smallest set of tokens with this probability.")]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from so many tokens; 0: all.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes answers repeatable.", show_default=False)]
WeightsOption = Annotated[str, typer.Option("--weights", help="as is, fp32, bf16, int8 or int4.")]


@app.command(epilog="Example: groundup chat runs/quickstart --system 'Answer in one sentence.'")
def chat(
    model: ModelArg,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    seed: Seed = None,
    weights: WeightsOption = "as is",
) -> None:
    """Talk to a model in the terminal."""
    from groundup.base.generation import SamplingParams
    from groundup.stages.chat import chat as run_chat
    from groundup.stages.models import resolve_model

    params = SamplingParams(max_new_tokens, temperature, top_p, top_k, seed=seed)
    run_chat(resolve_model(model), params, system=system, weights=weights)


@app.command(epilog="Example: groundup generate runs/quickstart --prompt 'What is rain?'")
def generate(
    model: ModelArg,
    prompt: Prompt,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text instead of answering it.")] = False,
    num_samples: Annotated[int, typer.Option("--num-samples", help="Independent answers.")] = 1,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End at this text; may be repeated.", show_default=False)
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    seed: Seed = None,
    weights: WeightsOption = "as is",
) -> None:
    """Answer one prompt, or continue one text, on standard output."""
    from groundup.base.generation import SamplingParams
    from groundup.stages.generate import generate as run_generate
    from groundup.stages.models import resolve_model

    params = SamplingParams(max_new_tokens, temperature, top_p, top_k, num_samples, seed, tuple(stop or ()))
    for text in run_generate(resolve_model(model), prompt, params, system=system, raw=raw, weights=weights):
        typer.echo(text)


app.command(epilog="Example: groundup serve runs/quickstart --port 8000")(serve)


Data = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="Where the application keeps what people say (SQLite).")
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        help="Instead of --data: postgresql://USER:PASSWORD@HOST/NAME, for a team (or GROUNDUP_DATABASE).",
        show_default=False,
    ),
]
ANNOTATIONS = Path("annotations")


def _annotation_database(data: Path, url: str | None) -> str:
    need_extra(
        "annotate", "fastapi", "uvicorn", "sqlalchemy", "alembic", "argon2", "multipart", "httpx", "markdown_it", "nh3"
    )
    return url or os.environ.get("GROUNDUP_DATABASE") or str(data / "annotations.sqlite")


@annotate_app.callback(invoke_without_command=True, epilog="Example: groundup annotate --data annotations --port 8080")
def annotate(
    context: typer.Context,
    data: Data = ANNOTATIONS,
    database: DatabaseUrl = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8080,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="A further name of this server; may be repeated.", show_default=False
        ),
    ] = None,
    https: Annotated[bool, typer.Option("--https", help="Browsers come by HTTPS, through a proxy in front.")] = False,
    handover: Annotated[
        list[Path] | None,
        typer.Option("--handover", metavar="DIR", help="A run that waits for ratings; repeatable.", show_default=False),
    ] = None,
    overlap: Annotated[
        int, typer.Option("--overlap", min=1, max=100, help="With --handover: people that rate each comparison.")
    ] = 1,
) -> None:
    """People compare, write and grade responses in the browser."""
    if context.invoked_subcommand is not None:
        sources = [context.get_parameter_source(name) for name in context.params]
        if any(source is not None and source.name == "COMMANDLINE" for source in sources):
            raise UserError("options of `groundup annotate` stand before its subcommand", "write them after it")
        return
    path = _annotation_database(data, database)
    from groundup.feedback.app import run_app
    from groundup.feedback.settings import AnnotateConfig

    if "://" not in path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    settings = AnnotateConfig(
        database=path, host=host, port=port, hosts=allow_host or [], secure_cookies=https, handover_overlap=overlap
    )
    run_app(settings, handover or [])


@annotate_app.command("export", epilog="Example: groundup annotate export --project helpful --out comparisons")
def annotate_export(
    project: Annotated[str, typer.Option("--project", help="Name of the project.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder.", show_default=False)],
    held_out: Annotated[float, typer.Option("--held-out", min=0, max=0.9, help="Share kept for testing.")] = 0.1,
    data: Data = ANNOTATIONS,
    database: DatabaseUrl = None,
) -> None:
    """What people said, as an artifact that training reads."""
    path = _annotation_database(data, database)
    from groundup.feedback.commands import export

    for line in export(path, project, out, held_out):
        typer.echo(line)


@annotate_app.command("import", epilog="Example: groundup annotate import prompts.jsonl --project helpful")
def annotate_import(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="Prompts, items, or an export's folder.", show_default=False)
    ],
    project: Annotated[
        str | None,
        typer.Option("--project", help="Where to; of an export: instead of its own name.", show_default=False),
    ] = None,
    new_batch: Annotated[bool, typer.Option("--new-batch", help="Open the next batch for them.")] = False,
    data: Data = ANNOTATIONS,
    database: DatabaseUrl = None,
) -> None:
    """Add prompts or items to a project, or a whole project from its export."""
    path = _annotation_database(data, database)
    from groundup.feedback.commands import import_source

    for line in import_source(path, source, project, new_batch):
        typer.echo(line)


@app.command(epilog="Example: groundup convert runs/quickstart model.gguf --to gguf --quantisation q8_0")
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A model, as for chat.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="A new file or folder.", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="hf, meta, gguf or llama2c.", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="hf, meta: float32, bfloat16 or float16.", show_default=False)
    ] = None,
    shards: Annotated[
        int | None, typer.Option("--shards", help="meta: number of model-parallel files.", show_default=False)
    ] = None,
    quantisation: Annotated[
        str | None, typer.Option("--quantisation", help="gguf: f32, f16, bf16 or q8_0.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Use this one instead of the model's.", show_default=False)
    ] = None,
) -> None:
    """Write a model in another format."""
    from groundup.stages.convert import convert_model
    from groundup.stages.models import resolve_model

    convert_model(
        resolve_model(source), target, to, dtype=dtype, shards=shards, quantisation=quantisation, tokenizer=tokenizer
    )
    typer.echo(target)


@app.command("show-batch", epilog="Example: groundup show-batch recipes/quickstart.yaml sft-v1 --rows 2")
def show_batch(
    recipe: RecipeArg,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="As in sft-v1, rm-helpful-1.", show_default=False)],
    overrides: Overrides = None,
    out: Out = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 2,
    step: Annotated[int, typer.Option(min=0, help="Optimizer step, counted from 0.")] = 0,
) -> None:
    """The exact tokens a stage trains on, target tokens coloured."""
    from groundup.stages.show import show_batches

    show_batches(_pipeline(recipe, overrides, out), stage, rows, step)


@app.command(epilog="Example: groundup lineage runs/quickstart/sft-v2")
def lineage(
    path: Annotated[
        Path,
        typer.Argument(metavar="RUN[/ARTIFACT]", help="A run's folder or one of its artifacts.", show_default=False),
    ],
) -> None:
    """Where an artifact came from, back to the raw text."""
    from rich.console import Console

    from groundup.stages.lineage import find_artifact, lineage_tree

    console = Console()
    if not console.is_terminal:
        console = Console(width=10_000)  # a path cut at column 80 is of no use to the program that reads it
    console.print(lineage_tree(find_artifact(path)))


@data_app.command("list", epilog="Example: groundup data list --kind text")
def data_list(
    kind: Annotated[
        str | None,
        typer.Option(help="Only text, dialogues, prompts, preferences, labels or model.", show_default=False),
    ] = None,
) -> None:
    """Known sources with their licences."""
    from groundup.stages.data_commands import show_sources

    show_sources(kind)


@data_app.command("get", epilog="Example: groundup data get grimm --out grimm.jsonl")
def data_get(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A source that `groundup data list` shows.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="File or folder (default: the cache).", show_default=False),
    ] = None,
) -> None:
    """Fetch a source, check its sha256, print its licence, and write it as one file."""
    from groundup.data.sources import get_source

    typer.echo(get_source(name, out))


def main() -> None:
    """Entry point of the `groundup` command."""
    app(prog_name="groundup")


if __name__ == "__main__":
    main()
