"""Tokenizers give the ids that transformers gives, or are refused; however one was saved, it is one.

data/tokenizer_fields.json has small tokenizers with other files beside them, and what transformers 5 makes of
them (tests/fixtures/make_tokenizers.py).
"""

import json
import shutil
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import tokenizers
from tiny_checkpoints import CONFIG

from checkpoints import tokenizer_identity
from checkpoints.errors import CheckpointError
from checkpoints.tokenizer import read_tokenizer
from jblock.chat import template_files
from jblock.zoo.store import Zoo

DATA = Path(__file__).parent / "data"
GIVEN = json.loads((DATA / "tokenizer_fields.json").read_text(encoding="utf-8"))
REFUSED = {
    "added_tokens.json, a gap": "has the id 283",
    "added_tokens.json, another's id": "has the id 5",
    "add_prefix_space, remade": "add_prefix_space is True",
    "split_special_tokens": "split_special_tokens is true",
    "model, split": "split_special_tokens is true",
}
NOTED = {
    "added_tokens.json": "2 tokens that stand only beside tokenizer.json",
    "decoder, flags": "flags of 1 added tokens are taken from tokenizer_config.json",
    "add_bos_token false": "add_bos_token is False",
    "add_eos_token true": "add_eos_token is True",
    "add_prefix_space true": "add_prefix_space is True",
    "add_prefix_space false": "add_prefix_space is False",
    "do_lower_case": "1 fields are ignored, tokenizer.json decides: do_lower_case",
}


def write(folder: Path, name: str) -> Path:
    """The files of a case in a new folder."""
    case = GIVEN["cases"][name]
    folder.mkdir(exist_ok=True)
    if case["tokenizer"] == "model":
        shutil.copy(DATA / "bpe.model", folder / "tokenizer.model")
    else:
        text = json.dumps(GIVEN["tokenizers"][case["tokenizer"]], ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    for file, data in case["files"].items():
        (folder / file).write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("name", GIVEN["cases"])
def test_ids_are_those_of_transformers_or_it_is_refused(name, tmp_path):
    if name in REFUSED:
        with pytest.raises(CheckpointError, match=REFUSED[name]):
            read_tokenizer(write(tmp_path, name))
        return
    found = read_tokenizer(write(tmp_path, name))
    made = tokenizers.Tokenizer.from_str(found.serving.decode())
    case = GIVEN["cases"][name]
    ids = [made.encode(text).ids for text in GIVEN["texts"]]
    assert ids == case["ids"]
    assert [made.decode(i, skip_special_tokens=True) for i in ids] == case["texts"]
    told = " ".join(found.notes)
    assert NOTED.get(name, "") in told
    if "ignored" in name or name == "names only":
        assert not told


def test_malformed_files_beside_a_tokenizer_are_refused(tmp_path):
    for file, data in (
        ("tokenizer_config.json", {"pad_token": 7}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": "<x>"}, "bos_token": [1]}),
        ("added_tokens.json", {"<x>": "y"}),
        ("special_tokens_map.json", {"additional_special_tokens": "<x>"}),
    ):
        folder = write(tmp_path / "t", "nothing")
        (folder / file).write_text(json.dumps(data))
        with pytest.raises(CheckpointError, match=r"cannot be read|another tokenizer"):
            read_tokenizer(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("tekken.json", "mistral-common"),
        ("tokenizer.model.v3", "SentencePiece"),
        ("vocab.json", "byte-level BPE"),
        ("tiktoken.model", "tiktoken"),
        ("spiece.model", "SentencePiece"),
    ],
)
def test_a_tokenizer_in_another_form_says_what_it_is_and_what_to_do(file, what, tmp_path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{what}.*no tokenizer.json: make one.*or remove"):
        read_tokenizer(tmp_path)
    shutil.copy(write(tmp_path / "t", "nothing") / "tokenizer.json", tmp_path)
    assert read_tokenizer(tmp_path) is not None


def another_way(data: dict) -> bytes:
    """A tokenizer.json as an earlier release of the library wrote it."""
    data = json.loads(json.dumps(data))
    data["model"]["merges"] = [" ".join(m) for m in data["model"]["merges"]]
    data["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    del data["model"]["ignore_merges"], data["pre_tokenizer"]["use_regex"]
    data["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_id": 0}
    data["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "<s>"}
    return json.dumps(data, ensure_ascii=False, indent=2).encode()


def test_a_base_and_its_fine_tune_have_one_tokenizer(tmp_path, cli):
    """Whatever release saved them, with the fields that it adds; and each is written again as it came."""
    data = GIVEN["tokenizers"]["plain"]
    pretty = json.dumps(data, ensure_ascii=False, indent=2).encode()
    ways = {
        "base": (another_way(data), {"bos_token": "<s>"}),
        "saved": (pretty, {"bos_token": "<s>", "is_local": True, "backend": "tokenizers"}),
        "dense": (json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(), {}),
        "escaped": (json.dumps(data).encode(), {"legacy": True}),
    }
    for name, (raw, config) in ways.items():
        source = tiny.write_checkpoint(tmp_path / name, CONFIG | {"vocab_size": 300})
        (source / "tokenizer.json").write_bytes(raw)
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        cli.ok("hf", source, "--name", name)
        cli.ok("verify", name, "--against", source)
    zoo = Zoo.open(cli.zoo)
    chains = [zoo.chain(name) for name in ways]
    assert len({c.tokenizer for c in chains}) == 1
    assert len(list((cli.zoo / "tokenizers").iterdir())) == 1
    for name, chain in zip(ways, chains, strict=True):
        kept = zoo.files("sources", chain.tokenizer_files)
        assert sum(map(len, kept.values())) < len(pretty) / 2, name
        cli.ok("export", name, "--out", tmp_path / f"{name}-out")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            exported = (tmp_path / f"{name}-out" / file).read_bytes()
            assert exported == (tmp_path / name / file).read_bytes(), (name, file)


def test_another_tokenizer_is_another():
    data = GIVEN["tokenizers"]["plain"]
    same = tokenizer_identity.canonical(data)
    assert tokenizer_identity.canonical(json.loads(another_way(data))) == same
    for part, change in (
        ("pre_tokenizer", {"add_prefix_space": True}),
        ("model", {"ignore_merges": True}),
        ("model", {"merges": data["model"]["merges"][:-1]}),
        ("post_processor", None),
        ("decoder", None),
    ):
        other = data | {part: None if change is None else data[part] | change}
        assert tokenizer_identity.canonical(other) != same


@pytest.mark.parametrize(
    "kept",
    [
        {tokenizer_identity.FORM: b"{}"},
        {tokenizer_identity.FORM: b'{"data":{"model":{"vocab":0}},"indent":2,"merges":"pairs"}'},
        {tokenizer_identity.FORM: b"["},
        {tokenizer_identity.DEFLATED: b"x"},
    ],
)
def test_a_form_that_leads_nowhere_is_an_error(kept):
    serving = tokenizer_identity.canonical(GIVEN["tokenizers"]["plain"])
    with pytest.raises(ValueError):
        tokenizer_identity.file_of(kept, serving)


def test_what_is_said_of_ids(tmp_path, cli):
    """A model without a tokenizer, and one whose tokenizer has more ids than it has rows."""
    source = tiny.write_checkpoint(tmp_path / "src", CONFIG)
    assert "token ids only" in cli("hf", source, "--name", "m").err
    write(source, "nothing")
    assert "the tokenizer has ids up to 277, the model only 31" in cli("hf", source, "--name=m").err


@pytest.mark.parametrize("jinja", [True, False])
def test_what_a_chat_needs_is_in_the_tokenizer_s_folder(tmp_path, cli, jinja):
    """The server reads of it what it would read of the checkpoint; bookkeeping makes no other tokenizer."""
    chat = {"extra_special_tokens": {"image_token": "<tool>"}, "chat_control_tokens": ["<tool>"]}
    chat |= {"response_template": {"x": 1}} | ({} if jinja else {"chat_template": "{{ messages }}"})
    chains = []
    for name, more in (("base", {}), ("saved", {"is_local": True, "backend": "tokenizers"})):
        source = tiny.write_checkpoint(tmp_path / name, CONFIG | {"vocab_size": 300})
        write(source, "nothing")
        if jinja:
            (source / "chat_template.jinja").write_text("{{ bos_token }}{{ messages }}")
        (source / "tokenizer_config.json").write_text(json.dumps(chat | more))
        (source / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>"}}')
        cli.ok("hf", source, "--name", name)
        chains.append(Zoo.open(cli.zoo).chain(name))
        served = template_files.load(Zoo.open(cli.zoo).tokenizer_path(chains[-1].tokenizer))
        assert served is not None and served == template_files.load(source)
        assert served.special_tokens["bos_token"] == "<s>"
    assert chains[0].tokenizer == chains[1].tokenizer
