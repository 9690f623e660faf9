"""Stop strings across token borders: the text ends before the first, and no part of it is given out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.infer.text import ResponseText


class Pieces:
    """A decoder whose token i is the i-th piece."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]

    def flush(self) -> str:
        return self.rest


def run(pieces: list[str], stop: tuple[str, ...], rest: str = "") -> tuple[list[str], bool]:
    text = ResponseText(Pieces(pieces, rest), stop)
    given_out = []
    for index in range(len(pieces)):
        given_out.append(text.push(index))
        if text.is_stopped:
            return given_out, True
    return [*given_out, text.finish()], text.is_stopped


def test_without_stop_strings_text_passes_through() -> None:
    assert run(["a", "", "bc"], (), "d") == (["a", "", "bc", "d"], False)


def test_a_stop_string_may_span_tokens() -> None:
    assert run(["Hi \n", "\nUs", "er: x"], ("\n\nUser:",)) == (["Hi ", "", ""], True)


def test_what_only_looks_like_a_beginning_comes_out_later() -> None:
    assert run(["a\n", "\nUse", "less"], ("\n\nUser:",)) == (["a", "", "\n\nUseless", ""], False)
    assert run(["a\n"], ("\n\n",)) == (["a", "\n"], False)


def test_the_earliest_stop_string_counts() -> None:
    assert run(["one two three"], ("three", "two")) == (["one "], True)


def test_the_rest_of_the_decoder_can_complete_a_stop_string() -> None:
    assert run(["ab"], ("bc",), rest="c") == (["a", ""], True)


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_split_gives_the_text_before_a_stop(pieces: list[str], stop: list[str]) -> None:
    given_out, is_stopped = run(pieces, tuple(stop))
    text = "".join(given_out)
    whole = "".join(pieces)
    assert whole.startswith(text)
    assert not any(s in text for s in stop)
    assert is_stopped == any(s in whole for s in stop)
    if not is_stopped:
        assert text == whole


@pytest.mark.parametrize("stop", [("aa",), ("aab", "ab")])
def test_repeated_beginnings(stop: tuple[str, ...]) -> None:
    given_out, is_stopped = run(["a", "a", "a", "b"], stop)
    assert is_stopped
    assert "".join(given_out) == {("aa",): "", ("aab", "ab"): "a"}[stop]
