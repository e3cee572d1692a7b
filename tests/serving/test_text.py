"""A model's text: stop strings that are special tokens, and prompts that are too long to be encoded whole."""

import asyncio

import pytest
from tokenizer_fixtures import FAMILIES, byte_fallback, byte_level

from serving.errors import RequestError, fitting
from serving.stop import StopMatcher
from serving.text import TextCodec, TextStream


def collected(codec, ids, stops, min_tokens=0):
    """(text, ids that belong to it, whether it stopped) of ids one at a time."""
    stream = TextStream(codec, stops, min_tokens)
    text, count = "", 0
    for token_id in ids:
        piece = stream.push((token_id,))
        text, count = text + piece.text, count + piece.num_tokens
        if piece.stopped:
            return text, count, True
    piece = stream.flush()
    return text + piece.text, count, piece.stopped


@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
def test_a_special_token_as_a_stop_string(tokenizer):
    codec = TextCodec(tokenizer())
    end = tokenizer().token_to_id("</s>")
    ids = tokenizer().encode("hello hello", add_special_tokens=False).ids
    for stops in (["</s>"], ["never", "</s>"], ["</s>", "<s>"]):
        text, count, stopped = collected(codec, [*ids, end, *ids], stops)
        assert (text, count, stopped) == (codec_text(tokenizer(), ids), len(ids) + 1, True)
    # Not a stop string: dropped, as ever.
    assert collected(codec, [*ids, end], ["never"])[0] == codec_text(tokenizer(), ids)
    assert not collected(codec, [*ids, end], ["<s>"])[2]
    # Within min_tokens nothing stops.
    assert collected(codec, [end, *ids, end], ["</s>"], min_tokens=1)[1] == len(ids) + 2


def codec_text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_a_stop_string_of_text_and_a_special_token():
    codec, tokenizer = TextCodec(byte_level()), byte_level()
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    hello, the = tokenizer.encode("hello the").ids, tokenizer.encode("the").ids
    assert collected(codec, [*hello, end], [" the</s>"]) == ("hello", len(hello) + 1, True)
    assert collected(codec, [*hello, end, *the], ["</s>the"]) == (
        "hello the",
        len(hello) + 1 + len(the),
        True,
    )
    assert collected(codec, [end, start, *the], ["</s><s>"]) == ("", 2, True)
    # What was held back for it and did not come to be is sent, without the special token.
    assert collected(codec, [*hello, end, *hello], ["</s>never"]) == (
        "hello thehello the",
        2 * len(hello) + 1,
        False,
    )


def test_an_unfinished_character_before_a_special_token_is_shown():
    tokenizer = byte_fallback()
    half = tokenizer.token_to_id("<0xE4>")
    text, _, stopped = collected(
        TextCodec(tokenizer), [half, tokenizer.token_to_id("</s>")], ["</s>"]
    )
    assert (text, stopped) == ("�", True)


def test_hidden_text_is_matched_and_never_sent():
    matcher = StopMatcher(["<a><b>", "x<a>y"])
    assert matcher.push("1x") == ("1", False)
    assert matcher.push("<a>", hidden=True) == ("", False)
    assert matcher.push("z") == ("xz", False)
    assert matcher.push("<a>", hidden=True) == ("", False)
    assert matcher.push("<a>", hidden=True) == ("", False)
    assert matcher.push("2") == ("2", False)
    assert matcher.push("3x") == ("3", False)
    matcher.push("<a>", hidden=True)
    assert matcher.flush() == "x"
    assert matcher.push("<a>", hidden=True) == ("", False)
    assert matcher.push("<b>", hidden=True) == ("", True)


def encode(codec, text, most):
    return asyncio.run(codec.encode(text, most))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", ["hello the ", "hello", "é", "x\n"])
def test_a_text_is_encoded_whole_or_found_too_long(family, unit):
    codec = TextCodec(FAMILIES[family]())
    for times in (10, 900, 3000):
        text = unit * times
        ids = tuple(FAMILIES[family]().encode(text).ids)
        assert encode(codec, text, len(ids)) == ids
        if len(ids) > 1:
            assert encode(codec, text, len(ids) - 1) is None
            assert encode(codec, text, len(ids) // 2) is None


def test_of_a_text_that_is_far_too_long_only_the_beginning_is_encoded(monkeypatch):
    codec = TextCodec(byte_level())
    seen = []
    whole = TextCodec._encode
    monkeypatch.setattr(
        TextCodec, "_encode", lambda self, text, s: seen.append(len(text)) or whole(self, text, s)
    )
    assert encode(codec, "the cat sat " * 100_000, 1000) is None
    assert sum(seen) < 20_000


@pytest.mark.parametrize("character", ["a", "é", "好", "🙂", "\n", "%"])
def test_a_message_fits_the_metadata_whatever_it_says(character):
    message = RequestError(None, character * 100_000).message
    written = sum(1 if " " <= c <= "~" and c != "%" else 3 * len(c.encode()) for c in message)
    assert 2480 < written <= 2500
    assert fitting(character * 100) == character * 100
