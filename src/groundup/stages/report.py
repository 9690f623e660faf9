"""Stage `report`: everything a run made -> one HTML page, with sample chats of its newest model."""

from typing import Any

from pydantic import Field

from groundup.base.config import Config
from groundup.base.generation import SamplingParams
from groundup.base.progress import say
from groundup.base.records import Message
from groundup.base.seeds import derive_seed
from groundup.infer.engine import Engine
from groundup.model.checkpoint import load_checkpoint
from groundup.report.page import SampleChat, write_page
from groundup.stages.job import Job

VERSION = 3
PAGE = "index.html"


class ReportConfig(Config):
    """What the page shows besides the numbers."""

    title: str | None = None
    """null: the name of the run's folder."""
    description: str = ""
    prompts: tuple[str, ...] = (
        "Hello! Who are you?",
        "What is the capital of France?",
        "Write a short story about a dog and a river.",
    )
    """Each is asked of the newest model in a conversation of its own; [] leaves the chats out."""
    system: str | None = None
    max_new_tokens: int = Field(128, gt=0)
    temperature: float = Field(0.7, ge=0)
    """0: the most likely token each time."""
    top_p: float = Field(0.9, gt=0, le=1)


def run(config: ReportConfig, job: Job) -> dict[str, Any]:
    """Write index.html; returns how many chats it shows."""
    models = [(name, artifact) for name, artifact in job.inputs.items() if artifact.kind == "model"]
    chats = _sample_chats(config, job, models[-1][0]) if models and config.prompts else []
    write_page(job.out / PAGE, config.title or job.out.absolute().parent.name, config.description, job.inputs, chats)
    if chats:
        say(f"{chats[0].model} answers:")
        for message in chats[0].messages:
            say(f"  {message.role}: {message.content}")
    return {"sample_chats": len(chats)}


def _sample_chats(config: ReportConfig, job: Job, name: str) -> list[SampleChat]:
    checkpoint = load_checkpoint(job.inputs[name].path)
    engine = Engine(checkpoint.model, checkpoint.tokenizer)
    system = (Message("system", config.system),) if config.system else ()
    conversations = [(*system, Message("user", prompt)) for prompt in config.prompts]
    prompts = [checkpoint.chat.encode_prompt(conversation) for conversation in conversations]
    params = [
        SamplingParams(
            max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p,
            seed=derive_seed(job.seed, "chat", number), stop_ids=checkpoint.chat.stop_ids,
        )
        for number in range(len(prompts))
    ]  # fmt: skip
    responses = engine.generate(prompts, params)
    return [
        SampleChat(name, (*conversation, Message("assistant", completions[0].text.strip())))
        for conversation, completions in zip(conversations, responses, strict=True)
    ]
