"""Rendering a model's own Jinja chat template: text out of a file that anybody may have written.

The sandbox keeps a template from reaching Python; the limits below keep it from stalling or filling the machine.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from groundup.base.errors import UserError

_MAX_TEMPLATE_CHARACTERS = 1_000_000
_MAX_RENDERED_CHARACTERS = 64_000_000
_MAX_CPU_SECONDS = 5.0
_TICK = "_groundup_tick"


class _TickInLoops(Extension):
    """Puts a call of the clock at the start of every loop's and macro's body."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        opened = False
        inside = ""
        for token in stream:
            yield token
            if opened:
                inside = token.value
            opened = token.type == "block_begin"
            if token.type == "block_end" and inside in ("for", "macro"):
                inside = ""
                for kind, value in (
                    ("variable_begin", ""), ("name", _TICK), ("lparen", "("), ("rparen", ")"), ("variable_end", ""),
                ):  # fmt: skip
                    yield Token(token.lineno, kind, value)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for transformers; for the text itself it means nothing."""

    tags = {"generation"}  # noqa: RUF012  # declared so by the base class

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    # One multiplication or power can ask for more memory than any loop.
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [abs(value) if isinstance(value, int | float) else len(value) for value in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > _MAX_TEMPLATE_CHARACTERS:
            raise jinja2.exceptions.SecurityError(f"{operator} with these values is not allowed in a chat template")
        return super().call_binop(context, operator, left, right)


def render_template(
    template: str, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool, special: Mapping[str, str]
) -> str:
    """The text of a dialogue; `special` maps names such as `bos_token` to their strings.

    Raises: UserError when the template is malformed, refuses the messages, or exceeds the limits.
    """
    started = time.thread_time()

    def tick() -> str:
        if time.thread_time() - started > _MAX_CPU_SECONDS:
            raise UserError(f"the chat template ran for more than {_MAX_CPU_SECONDS:.0f} s")
        return ""

    pieces, length = [], 0
    try:
        for piece in _compile(template).generate(
            messages=[dict(message) for message in messages], add_generation_prompt=add_generation_prompt,
            tools=None, documents=None, **special, **{_TICK: tick},
        ):  # fmt: skip
            length += len(piece)
            if length > _MAX_RENDERED_CHARACTERS:
                raise UserError(f"the chat template wrote more than {_MAX_RENDERED_CHARACTERS:,} characters")
            pieces.append(piece)
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(f"the chat template failed: {error}") from error
    return "".join(pieces)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    if len(template) > _MAX_TEMPLATE_CHARACTERS:
        raise UserError(
            f"the chat template has {len(template):,} characters; at most {_MAX_TEMPLATE_CHARACTERS:,} are read"
        )
    # The settings that templates on the Hub are written for; autoescape would change what the model reads.
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=[loopcontrols, _Generation, _TickInLoops]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template)
    except (jinja2.TemplateError, RecursionError) as error:
        raise UserError(f"the chat template is not valid: {error}") from error


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
