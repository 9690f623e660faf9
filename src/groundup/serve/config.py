"""How the server is set up, and the limits of what a request may ask for: each has a 4xx answer.

Choice: limits are constants, sized for one machine and far above what chat clients send.
"""

from pydantic import Field

from groundup.base.config import Config

MAX_BODY_BYTES = 2 * 1024 * 1024
"""About 350,000 token ids, or a text of 500,000 tokens."""
MAX_JSON_DEPTH = 64
MAX_JSON_BRACKETS = 200_000
"""Objects and lists in one body."""
MAX_JSON_STRINGS = 20_000
"""Strings in one body, keys included: short ones take ten times their bytes once they are read."""
MAX_JSON_KEYS = 2048
"""In one object: each that no field has is an error of its own."""
MAX_CHOICES = 64
"""Responses to one call: `n` times the number of prompts."""
MAX_N = 16
MAX_PROMPTS = 64
MAX_MESSAGES = 1024
MAX_CONTENT_PARTS = 256
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_CHAT_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 20
"""Choice: OpenAI's completions stop at 5, their chat at 20; there is no reason for two limits."""
MAX_LOGIT_BIASES = 1024
MAX_SCHEMA_CHARACTERS = 32 * 1024
MAX_EMBEDDING_INPUTS = 256
MAX_TOP_K = 1_000_000
MAX_SEED = 2**63 - 1

DEFAULT_TEMPERATURE = 0.6
DEFAULT_TOP_P = 0.9
"""Source: the defaults of Meta's chat example; used where a model's generation_config.json says nothing."""
DEFAULT_COMPLETION_TOKENS = 16
"""Of /v1/completions, as OpenAI's; chat defaults to all that fits into the context."""


class ServeConfig(Config):
    """What the application needs to know beside its models."""

    host: str = Field(default="127.0.0.1", description="address to listen on")
    api_keys: tuple[str, ...] = Field(
        default=(), repr=False, description="keys of which every request must carry one; none: no key is asked for"
    )
    allow_hosts: tuple[str, ...] = Field(
        default=(), description="further names under which clients reach the server, without ports"
    )
    drain_seconds: float = Field(
        default=2.0, ge=0, description="what engines get to end after the web server has drained"
    )
