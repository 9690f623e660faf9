"""What may stand in a request: OpenAI's fields and a few of ours, with their limits.

Choice: a field that nobody knows is an error, as it is with OpenAI, because a misspelt one would silently change
nothing; OpenAI's fields that mean nothing on one's own machine (`user`, `store`, ...) are accepted and ignored.
"""

import difflib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, PlainValidator, ValidationError

from groundup.base.records import Message, Role
from groundup.serve import config as limits
from groundup.serve.wire import ApiError

TokenIds = list[int]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


B = TypeVar("B", bound=BaseModel)


def parse_request(cls: type[B], value: dict[str, Any]) -> B:
    """Raises: ApiError 400 that names the first wrong field."""
    try:
        return cls.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")[:200]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), cls.model_fields, n=1) if len(first["loc"]) == 1 else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ApiError(400, f"unknown field {param!r}{hint}", param=param, code="unknown_parameter")
    message = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"{param}: {message}", param=param or None, code="invalid_value")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _stop(value: Any) -> Any:
    if isinstance(value, str | list) and "" in _as_list(value):
        raise ValueError("a stop string must not be empty")
    return _as_list(value)


def _inputs(most: int) -> Callable[[Any], list[str | TokenIds]]:
    """Texts or token ids, one or a list of them, as a list."""

    def validate(value: Any) -> list[str | TokenIds]:
        if isinstance(value, str) or (isinstance(value, list) and value and _are_ids(value)):
            value = [value]
        if not isinstance(value, list) or not value:
            raise ValueError("must be a text, a list of texts, a list of token ids or a list of such lists")
        if len(value) > most:
            raise ValueError(f"at most {most} at a time, and there are {len(value)}")
        for item in value:
            if not isinstance(item, str) and not (isinstance(item, list) and item and _are_ids(item)):
                raise ValueError("every item must be a text or a list of token ids that is not empty")
        return value

    return validate


def _are_ids(items: list[Any]) -> bool:
    return all(type(item) is int for item in items)


def _text(value: Any) -> str:
    """The text of a message's content, which may come in parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a text or a list of parts with type 'text'")
    if len(value) > limits.MAX_CONTENT_PARTS:
        raise ValueError(f"at most {limits.MAX_CONTENT_PARTS} parts, and there are {len(value)}")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("every part must be {'type': 'text', 'text': ...}: this model reads text only")
    return "".join(part["text"] for part in value)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > limits.MAX_LOGIT_BIASES:
        raise ValueError(f"at most {limits.MAX_LOGIT_BIASES} entries, and there are {len(value)}")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ValueError(f"{key[:40]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number within -100 and 100")
        if int(key) in biases:
            raise ValueError(f"token {int(key)} is named twice")
        biases[int(key)] = float(bias)
    return tuple(biases.items())


def _no_tools(value: Any) -> None:
    if value:
        raise ValueError("this server does not call tools; ask for JSON with response_format instead")


def _no_tool_choice(value: Any) -> None:
    if value not in (None, "none", "auto"):
        raise ValueError("this server does not call tools")


def _text_only(value: Any) -> None:
    if value not in (None, ["text"]):
        raise ValueError("this server answers with text only")


def _unsupported(value: Any) -> None:
    if value is not None:
        raise ValueError("this server does not support it")


Ignored = Annotated[Any, Field(default=None, exclude=True)]
Unsupported = Annotated[None, PlainValidator(_unsupported)]
Content = Annotated[str, PlainValidator(_text)]
Stops = Annotated[
    list[Annotated[str, Field(max_length=limits.MAX_STOP_CHARACTERS)]],
    BeforeValidator(_stop),
    Field(max_length=limits.MAX_STOPS),
]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Ignored: OpenAI's padding against observers of the network."""


class JsonSchema(_Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Output is held to the schema either way."""


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that the answer must follow; None: any text."""
        if self.type == "text":
            return None
        return json.dumps({"type": "object"} if self.json_schema is None else self.json_schema.schema_)


def _response_format(value: Any) -> Any:
    if isinstance(value, dict):
        is_schema = value.get("type") == "json_schema"
        if is_schema and not isinstance(value.get("json_schema"), dict):
            raise ValueError("type json_schema needs an object json_schema with name and schema")
        if not is_schema and value.get("json_schema") is not None:
            raise ValueError("json_schema belongs to type json_schema")
        if len(json.dumps(value)) > limits.MAX_SCHEMA_CHARACTERS:
            raise ValueError(f"the schema may have at most {limits.MAX_SCHEMA_CHARACTERS} characters")
    return value


class SamplingFields(_Body):
    """What both ways to generate have in common."""

    model: str = Field(max_length=1000)
    n: int | None = Field(default=None, ge=1, le=limits.MAX_N)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=limits.MAX_TOP_K)
    """Ours: draw from so many tokens; 0: all."""
    seed: int | None = Field(default=None, ge=-limits.MAX_SEED, le=limits.MAX_SEED)
    stop: Stops | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=limits.MAX_STOP_TOKEN_IDS)
    """Ours: further token ids that end a response."""
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...], PlainValidator(_logit_bias)] | None = None
    response_format: Annotated[ResponseFormat, BeforeValidator(_response_format)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    user: Ignored
    metadata: Ignored
    store: Ignored
    service_tier: Ignored
    safety_identifier: Ignored
    prompt_cache_key: Ignored
    prompt_cache_retention: Ignored


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Ignored
    refusal: Ignored
    annotations: Ignored
    audio: Unsupported = None
    tool_calls: Annotated[None, PlainValidator(_no_tools)] = None
    function_call: Annotated[None, PlainValidator(_no_tools)] = None

    @property
    def message(self) -> Message:
        """Choice: `developer` is OpenAI's newer word for `system`."""
        role: Role = "system" if self.role == "developer" else self.role
        return Message(role, self.content)


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], FailFast()] = Field(min_length=1, max_length=limits.MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=limits.MAX_CHAT_LOGPROBS)
    tools: Annotated[None, PlainValidator(_no_tools)] = None
    functions: Annotated[None, PlainValidator(_no_tools)] = None
    tool_choice: Annotated[None, PlainValidator(_no_tool_choice)] = None
    function_call: Annotated[None, PlainValidator(_no_tool_choice)] = None
    modalities: Annotated[None, PlainValidator(_text_only)] = None
    audio: Unsupported = None
    web_search_options: Unsupported = None

    parallel_tool_calls: Ignored
    prediction: Ignored
    reasoning_effort: Ignored
    verbosity: Ignored


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Annotated[list[str | TokenIds], PlainValidator(_inputs(limits.MAX_PROMPTS))]
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=limits.MAX_COMPLETION_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1, le=limits.MAX_N)
    suffix: Unsupported = None


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    model: str = Field(max_length=1000)
    input: Annotated[list[str | TokenIds], PlainValidator(_inputs(limits.MAX_EMBEDDING_INPUTS))]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    user: Ignored
