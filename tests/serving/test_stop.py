"""Stop strings: what is found does not depend on how the text was cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.stop import StopMatcher


def run(stops, pieces):
    matcher = StopMatcher(stops)
    text = ""
    for piece in pieces:
        more, stopped = matcher.push(piece)
        text += more
        if stopped:
            return text, True
    return text + matcher.flush(), False


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        (["END"], ["a", "E", "N", "D", "b"], ("a", True)),
        (["END"], ["aENDb"], ("a", True)),
        (["END"], ["aEN"], ("aEN", False)),
        (["END"], ["aEN", "EN", "D"], ("aEN", True)),
        (["aab"], ["aa", "ab"], ("a", True)),
        (["abcd", "bc"], ["abcd"], ("a", True)),
        (["abcd", "bc"], ["a", "b", "c"], ("a", True)),
        (["b", "ab"], ["ab"], ("", True)),
        (["\n\n"], ["x\n", "\ny"], ("x", True)),
        (["🙂"], ["x🙂"], ("x", True)),
        ([], ["x"], ("x", False)),
    ],
)
def test_cases(stops, pieces, expected):
    assert run(stops, pieces) == expected


def test_only_what_may_begin_a_stop_string_is_held_back():
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == ("the ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("x") == ("ENx", False)
    assert matcher.push("fin") == ("fin", False)


texts = st.text("ab", max_size=20)


@settings(deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), texts, st.data())
def test_the_cut_of_the_text_does_not_matter(stops, text, data):
    pieces, at = [], 0
    while at < len(text):
        step = data.draw(st.integers(1, 5))
        pieces.append(text[at : at + step])
        at += step
    got, stopped = run(stops, pieces)
    assert (got, stopped) == run(stops, list(text))
    assert stopped == any(s in text for s in stops)
    assert text.startswith(got)
    assert not any(s in got for s in stops)
    assert stopped or got == text
