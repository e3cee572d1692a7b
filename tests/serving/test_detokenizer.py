"""The pieces of a detokenized stream put together are the library's decoding, exactly."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_fixtures import FAMILIES, byte_fallback, byte_level

from serving.detokenizer import Detokenizer

TEXT = "héllo wörld 你好 🙂🙃 e\u0301 👩‍👩‍👧 \ufffd the cat"


def pieces(tokenizer, ids):
    stream = Detokenizer(tokenizer).stream()
    return [*(stream.push((i,)) for i in ids), stream.flush()]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_give_the_text_of_decoding_them_all(family, data):
    tokenizer = FAMILIES[family]()
    size = tokenizer.get_vocab_size()
    # Few kinds of ids, so that runs, repetitions and broken characters are common. Ids past the
    # vocabulary occur where a model pads its embedding.
    kinds = data.draw(st.lists(st.integers(0, size + 2), min_size=1, max_size=6))
    ids = data.draw(st.lists(st.sampled_from(kinds), max_size=120))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None)
@given(
    raw=st.lists(
        st.sampled_from(["é".encode(), "你".encode(), "🙂".encode(), b"a", b"\xf0\x9f", b"\xff"]),
        max_size=60,
    ),
    cuts=st.lists(st.integers(1, 7), min_size=1),
)
@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
def test_any_bytes_and_any_grouping_give_the_same_text(family, raw, cuts):
    tokenizer = FAMILIES[family]()
    ids = [_byte_id(tokenizer, family, b) for b in b"".join(raw)]
    stream, text, at = Detokenizer(tokenizer).stream(), "", 0
    while at < len(ids):
        step = cuts[at % len(cuts)]
        text += stream.push(ids[at : at + step])
        at += step
    text += stream.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


def _byte_id(tokenizer, family, byte):
    if family == "byte_fallback":
        return tokenizer.token_to_id(f"<0x{byte:02X}>")
    # GPT-2's printable substitutes: bytes that print stand for themselves, the rest follow 255.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return tokenizer.token_to_id(chr(byte if byte in plain else 256 + others.index(byte)))


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
def test_no_piece_shows_half_a_character(family):
    tokenizer = FAMILIES[family]()
    text = TEXT.replace("\ufffd", "")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    got = pieces(tokenizer, ids)
    assert not any("\ufffd" in p for p in got)
    assert "".join(got) == tokenizer.decode(ids)


def test_text_comes_as_soon_as_it_is_settled():
    tokenizer = byte_level()
    ids = tokenizer.encode("the cat").ids
    assert pieces(tokenizer, ids) == [*(tokenizer.decode([i]) for i in ids), ""]


def test_an_unfinished_character_comes_at_the_end():
    tokenizer = byte_level()
    ids = [_byte_id(tokenizer, "byte_level", b) for b in b"a\xf0\x9f"]
    assert pieces(tokenizer, ids) == ["a", "", "", "\ufffd"]


def test_a_special_token_within_a_character_is_not_seen():
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(t) for t in ("<0xC3>", "</s>", "<0xA9>", "x")]
    assert pieces(tokenizer, ids) == ["", "", "", "éx", ""]


def test_the_first_space_is_kept_or_dropped_as_the_decoder_says():
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(t) for t in ("▁the", "▁", "▁a")]
    assert "".join(pieces(tokenizer, ids)) == "the  a"


@pytest.mark.parametrize("token", ["é", "<0xC3>", "<0xFF>"])
def test_work_per_id_does_not_grow(token):
    tokenizer = byte_fallback()
    ids = [tokenizer.token_to_id(token)] * 20_000
    begin = time.monotonic()
    pieces(tokenizer, ids)
    assert time.monotonic() - begin < 5.0  # Decoding everything each time would take minutes.
