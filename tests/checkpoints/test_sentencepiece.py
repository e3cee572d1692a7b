"""A SentencePiece model becomes a tokenizer.json that gives the same ids, or is refused.

data/bpe.model was trained by sentencepiece 0.2.3 (BPE, 400 pieces, byte fallback, no normalization, spaces
kept) on this project's documents; data/bpe_expected.json holds texts and the ids that package gives them.
"""

import contextlib
import json
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import CONFIG

from checkpoints.errors import CheckpointError
from checkpoints.sentencepiece_model import convert
from checkpoints.tokenizer_fields import Beside
from jblock.zoo.store import Zoo

DATA = Path(__file__).parent / "data"
MODEL = (DATA / "bpe.model").read_bytes()
EXPECTED = json.loads((DATA / "bpe_expected.json").read_text())
BOS, EOS = 1, 2


def tokenizer(config=None, added=None):
    beside = Beside(config=config or {}, added=added or {})
    return tokenizers.Tokenizer.from_str(convert(MODEL, beside))


@pytest.mark.parametrize(("text", "ids"), EXPECTED, ids=[repr(t) for t, _ in EXPECTED])
def test_ids_are_those_of_sentencepiece(text, ids):
    assert tokenizer().encode(text).ids == [BOS, *ids]
    if "\u2581" not in text:  # which stands for a space
        assert tokenizer().decode([BOS, *ids]) == text


def test_what_is_put_around_a_prompt():
    ids = EXPECTED[0][1]
    bare = {"add_bos_token": False, "add_eos_token": True}
    assert tokenizer(bare).encode(EXPECTED[0][0]).ids == [*ids, EOS]
    assert tokenizer({"legacy": False}).encode(EXPECTED[0][0]).ids == [BOS, *ids]


def test_added_tokens():
    found = tokenizer(added={"<pad>": 400, "<tool>": 401})
    assert found.token_to_id("<tool>") == 401
    assert found.encode("<tool>").ids == [BOS, 401]
    decoder = {"0": {"content": "<unk>"}, "400": {"content": "<x>", "special": False}}
    assert tokenizer({"added_tokens_decoder": decoder}).token_to_id("<x>") == 400
    for added in ({"<pad>": 402}, {"<pad>": "x"}):
        with pytest.raises(CheckpointError):
            tokenizer(added=added)


def test_flags_of_added_tokens():
    """As transformers 5 tokenizes: rstrip and lstrip take the spaces beside a token into it."""
    entry = {"content": "<|user|>", "normalized": False, "special": True}
    text = "a <|user|> b"
    plain = tokenizer({"added_tokens_decoder": {"400": entry}}).encode(text).ids
    greedy = {**entry, "rstrip": True, "lstrip": True}
    found = tokenizer({"added_tokens_decoder": {"400": greedy}})
    assert found.encode(text).ids != plain and found.encode(text).ids.count(400) == 1
    assert found.encode(text).ids == found.encode("a<|user|>b").ids


def test_tokens_that_say_again_what_the_model_says():
    again = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 400}
    assert tokenizer(added=again).to_str() == tokenizer(added={"<|im_end|>": 400}).to_str()
    for wrong in ({"<s>": 2}, {"</s>": 1, "<x>": 400}):
        with pytest.raises(CheckpointError, match="its piece"):
            tokenizer(added=wrong)


def message(*fields):
    """Protobuf bytes of (number, value) fields: ints and bytes, all short."""
    out = b""
    for number, value in fields:
        wire = 0 if isinstance(value, int) else 2
        key = number << 3 | wire
        out += bytes([key]) if key < 128 else bytes([key & 127 | 128, key >> 7])
        out += bytes([value]) if wire == 0 else bytes([len(value)]) + value
    return out


PIECES = ((1, message((1, b"<unk>"), (3, 2))), (1, message((1, b"a"))))
TRAINER, NORMALIZER = ((3, 2),), ((3, 1), (4, 0), (5, 1))


def test_the_smallest_model():
    data = message(*PIECES, (2, message(*TRAINER)), (3, message(*NORMALIZER)))
    assert json.loads(convert(data, Beside()))["model"]["vocab"] == {"<unk>": 0, "a": 1}


@pytest.mark.parametrize(
    ("pieces", "trainer", "normalizer", "word"),
    [
        ((), (), (), "other than BPE"),
        ((), ((3, 1),), (), "other than BPE"),
        ((), ((24, 1),), (), "suffixes"),
        ((), (), ((2, b"map"),), "normalization"),
        ((), (), ((3, 0),), "dummy prefix"),
        ((), (), ((4, 1),), "extra spaces"),
        ((), (), ((5, 0),), "unescaped"),
        (((1, message((1, b"[INST]"), (3, 4))),), (), (), "user-defined"),
        (((1, message((1, b"a"))),), (), (), "repeated"),
    ],
)
def test_what_would_be_tokenized_differently_is_refused(pieces, trainer, normalizer, word):
    trainer = TRAINER + trainer if pieces or trainer or normalizer else ()
    sections = ((2, message(*trainer)), (3, message(*NORMALIZER, *normalizer)))
    with pytest.raises(CheckpointError, match=word):
        convert(message(*PIECES, *pieces, *sections), Beside())


@pytest.mark.parametrize(
    "data", [b"", b"\0", MODEL[:1000], b"IQ== 0\nIg== 1\n", b"\n" + b"\xff" * 20, b"\x08\x05"]
)
def test_what_is_no_such_model_is_refused(data):
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        convert(data, Beside())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_converted_or_refused(data):
    with contextlib.suppress(CheckpointError):
        convert(data, Beside())


def test_another_class_of_tokenizer_is_refused():
    with pytest.raises(CheckpointError, match="T5Tokenizer"):
        tokenizer({"tokenizer_class": "T5Tokenizer"})


def test_a_checkpoint_with_only_such_a_model(tmp_path, cli):
    source = tiny.write_checkpoint(tmp_path / "src", CONFIG | {"vocab_size": 400})
    (source / "tokenizer.model").write_bytes(MODEL)
    cli.ok("hf", source, "--name", "m")
    cli.ok("verify", "m", "--against", source)
    zoo = Zoo.open(cli.zoo)
    folder = zoo.tokenizer_path(zoo.chain("m").tokenizer)
    assert [p.name for p in folder.iterdir()] == ["tokenizer.json"]
    assert [*zoo.files("sources", zoo.chain("m").tokenizer_files)] == ["tokenizer.model"]
    found = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert found.encode(EXPECTED[0][0]).ids == [BOS, *EXPECTED[0][1]]
    (source / "tokenizer.model").write_bytes(b"pickle")
    assert cli("hf", source, "--name", "n").code == 2
