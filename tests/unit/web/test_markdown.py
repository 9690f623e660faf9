"""Markdown is shown, and nothing that it says runs."""

import re
from html.parser import HTMLParser

import pytest
from tests.apps.xss import payloads

from groundup.web.markdown import MAX_CHARACTERS, MAX_NESTING, render_markdown

ALLOWED = {
    **{name: set() for name in ("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "pre")},
    **{name: set() for name in ("blockquote", "ul", "li", "table", "thead", "tbody", "tr")},
    **{"a": {"href", "title", "target", "rel"}, "ol": {"start"}, "code": {"class"}, "th": {"align"}, "td": {"align"}},
}


class Elements(HTMLParser):
    """Every element with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("**bold** and *soft*", "<p><strong>bold</strong> and <em>soft</em></p>"),
        ("one\ntwo", "<p>one<br>\ntwo</p>"),
        ("3. c\n4. d", '<ol start="3">\n<li>c</li>\n<li>d</li>\n</ol>'),
        ("```python\na < b\n```", '<pre><code class="language-python">a &lt; b\n</code></pre>'),
        ("~~old~~", "<p><s>old</s></p>"),
        ("<b>&amp;", "<p>&lt;b&gt;&amp;</p>"),
    ],
)
def test_markdown_becomes_html(text: str, expected: str) -> None:
    assert render_markdown(text).strip() == expected


def test_columns_are_aligned_without_style_attributes() -> None:
    html = render_markdown("| a | b |\n|:-:|--:|\n| 1 | 2 |")
    assert '<td align="center">1</td>' in html
    assert '<td align="right">2</td>' in html
    assert "style" not in html


def test_links_open_elsewhere_and_say_nothing_of_this_page() -> None:
    (_, attributes), *_ = [e for e in Elements(render_markdown("[a](https://x.org/?a=1&b=2)")).found if e[0] == "a"]
    assert attributes == {"href": "https://x.org/?a=1&b=2", "target": "_blank", "rel": "noopener noreferrer nofollow"}


@pytest.mark.parametrize(
    "target", ["/logout", "logout", "//evil.invalid", "javascript:alert(1)", "data:text/html,x", "?a"]
)
def test_links_into_this_server_and_to_code_lead_nowhere(target: str) -> None:
    assert "href" not in render_markdown(f"[a]({target})")


def test_a_picture_is_only_a_link() -> None:
    html = render_markdown("![cat](https://x.org/cat.png)")
    assert "<img" not in html
    assert '<a href="https://x.org/cat.png"' in html


def test_no_payload_leaves_anything_but_the_allowed_elements() -> None:
    for payload in payloads(900):
        for tag, attributes in Elements(render_markdown(payload)).found:
            assert set(attributes) <= ALLOWED[tag], payload
            assert re.match("https?://|mailto:", attributes.get("href") or "https://"), payload
            assert re.fullmatch(r"(language-[\w+#.-]+)?", attributes.get("class") or ""), payload


def test_a_definition_that_nothing_uses_stays_visible() -> None:
    assert "https://x.org" in Elements(render_markdown("[a]: https://x.org")).text


@pytest.mark.parametrize(
    "text",
    [
        "<i>*a*</i>\n" * (MAX_CHARACTERS // 11 + 1),
        "> " * (MAX_NESTING + 1) + "deep",
        "- " * 500 + "deep",
        "1. " * 99 + "x",
    ],
)
def test_what_is_too_long_or_too_deep_is_shown_whole_as_it_is(text: str) -> None:
    shown = Elements(render_markdown(text))
    assert [tag for tag, _ in shown.found] == ["pre"]
    assert shown.text == text


def test_nesting_below_the_limit_is_rendered() -> None:
    html = render_markdown("> " * (MAX_NESTING - 3) + "deep")
    assert html.count("<blockquote>") == MAX_NESTING - 3
    assert "deep" in html


@pytest.mark.parametrize("text", ["", "\x00", "a\ud800b", "\u202e\u0000\ufeff", "\r\n\r\n"])
def test_odd_characters_are_no_error(text: str) -> None:
    render_markdown(text).encode()
