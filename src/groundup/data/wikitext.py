"""Plain text out of a Wikipedia XML dump: simple rules that keep the prose and drop the machinery around it."""

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import IO

_COMMENT = re.compile(r"<!--.*?-->", re.S)
_DROPPED_ELEMENT = re.compile(
    r"<(ref|math|gallery|timeline|imagemap|score|source|syntaxhighlight|table|code)\b[^>]*?(?:/>|>.*?</\1\s*>)",
    re.S | re.I,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_INNERMOST_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_INNERMOST_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.S)
_INNERMOST_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_EXTERNAL_LINK = re.compile(r"\[(?:https?|ftp)?:?//[^\s\]]+(?:\s+([^\]]*))?\]")
_EMPHASIS = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^(={2,6})\s*(.*?)\s*\1\s*$", re.M)
_TAIL_SECTION = re.compile(
    r"^==\s*(references|notes|footnotes|citations|sources|bibliography|further reading|external links|see also)\s*"
    r"==\s*$",
    re.M | re.I,
)
_HAS_NAMESPACE = re.compile(r"^\s*:?[A-Za-z-]{2,15}:\S")
_LIST_MARK = re.compile(r"^[*#:;]+\s*", re.M)
_LEFTOVER = re.compile(r"^\s*(?:\||!|\}\}|\{\{|__[A-Z]+__).*$", re.M)
_EMPTY_BRACKETS = re.compile(r"\s?\(\s*[;,:\s]*\)")
_ORPHANED_COMMAS = re.compile(r"\(\s*[,;:\s]+(?=\S)")
_BLANK_LINES = re.compile(r"\n\s*\n+")


def dump_articles(file: IO[bytes]) -> Iterator[tuple[str, str]]:
    """(title, plain text) of the articles in a MediaWiki XML dump; redirects and other name spaces are passed over."""
    for _, page in ElementTree.iterparse(file):  # noqa: S314 - only archives with a pinned sha256 come here
        if not page.tag.endswith("}page"):
            continue
        value = {element.tag.rpartition("}")[2]: element.text or "" for element in page.iter()}
        if value.get("ns") == "0" and "redirect" not in value:
            text = plain_text(value.get("text", ""))
            if text:
                yield value["title"], text
        page.clear()


def plain_text(markup: str) -> str:
    """The prose of one article: paragraphs, headings and list items, one blank line between paragraphs."""
    text = _COMMENT.sub("", markup)
    if tail := _TAIL_SECTION.search(text):
        text = text[: tail.start()]
    text = _DROPPED_ELEMENT.sub("", text)
    text = _until_stable(_INNERMOST_TEMPLATE, "", text)
    text = _until_stable(_INNERMOST_TABLE, "", text)
    while (after := _INNERMOST_LINK.sub(_link_label, text)) != text:
        text = after
    text = _EXTERNAL_LINK.sub(lambda match: match[1] or "", text)
    text = _EMPHASIS.sub("", _TAG.sub("", text))
    text = _HEADING.sub(r"\n\2\n", text)
    text = _LEFTOVER.sub("", _LIST_MARK.sub("", text))
    text = _ORPHANED_COMMAS.sub("(", _EMPTY_BRACKETS.sub("", html.unescape(text)))
    return _BLANK_LINES.sub("\n\n", text.replace("\xa0", " ")).strip()


def _until_stable(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    """Innermost first, so that nested templates and tables go without a parser."""
    while (after := pattern.sub(replacement, text)) != text:
        text = after
    return text


def _link_label(match: re.Match[str]) -> str:
    target, _, label = match[1].partition("|")
    if _HAS_NAMESPACE.match(target):
        return ""
    return label.rpartition("|")[2] or target
