"""Markdown of people and of models as HTML that is safe to put into a page.

Two walls, either of which is enough for scripts: the parser takes no HTML (tags become text), and what it makes goes
through an allow-list of tags and attributes. The pages' Content-Security-Policy is the third.
"""

import html
import re
from collections.abc import Sequence

import nh3
from markdown_it import MarkdownIt
from markdown_it.token import Token

MAX_CHARACTERS = 50_000
"""Longer texts are shown as they are: the parser's time grows faster than the text."""
MAX_NESTING = 32
"""Depth of lists and quotes. The parser leaves out what lies deeper, so that such texts are shown as they are."""

_TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre", "blockquote"),
    *("ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td"),
}
_ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}, "code": {"class"}}
_ALIGNMENTS = {"align": {"left", "center", "right"}}
_SCHEMES = {"http", "https", "mailto"}
_LANGUAGE_CLASS = re.compile(r"language-[\w+#.-]{1,32}")

# Images become links: a picture from elsewhere would tell its host who reads this. A definition of a link is shown as
# text: unused, it would be text that nobody sees. `breaks`: models mean their line ends.
_PARSER = (
    MarkdownIt("commonmark", {"html": False, "linkify": False, "breaks": True, "maxNesting": MAX_NESTING})
    .enable(["table", "strikethrough"])
    .disable(["image", "reference"])
)


def render_markdown(text: str) -> str:
    """Safe HTML: no scripts, styles, images, ids or relative links; links open elsewhere and say nothing of this page.

    Choice: a text that is too long or too deeply nested is shown whole as plain text; nothing is left out.
    """
    # Half of a surrogate pair can arrive in JSON, but is in no HTML.
    text = text.encode("utf-8", "replace").decode()
    if len(text) > MAX_CHARACTERS:
        return _plain(text)
    tokens = _PARSER.parse(text)
    if any(token.level >= MAX_NESTING - 1 for token in tokens):
        return _plain(text)
    _align_by_attribute(tokens)
    return nh3.clean(
        _PARSER.renderer.render(tokens, _PARSER.options, {}),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        tag_attribute_values={"th": _ALIGNMENTS, "td": _ALIGNMENTS},
        attribute_filter=_checked_attribute,
        set_tag_attribute_values={"a": {"target": "_blank"}},
        link_rel="noopener noreferrer nofollow",
        url_schemes=_SCHEMES,
        url_relative="deny",
    )


def _plain(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def _align_by_attribute(tokens: Sequence[Token]) -> None:
    """Columns are aligned by `align`: the pages' policy forbids the style attributes that the parser writes."""
    for token in tokens:
        style = token.attrs.pop("style", None)
        if style is not None:
            token.attrs["align"] = str(style).removeprefix("text-align:")


def _checked_attribute(tag: str, name: str, value: str) -> str | None:
    """Of classes only the language of a code block: others could borrow the looks of our own buttons."""
    if tag == "code" and name == "class" and not _LANGUAGE_CLASS.fullmatch(value):
        return None
    return value
