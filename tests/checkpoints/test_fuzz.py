"""Damaged and hostile checkpoints: an error each, never a crash, a hang or a write outside the zoo."""

import json
import random
import resource
import signal
import struct

import pytest
import tiny_checkpoints as tiny
from converter_cli import Cli
from tiny_checkpoints import CONFIG

_NAMES = ("../../out", "/etc/x", "a\0b", "", ".", "..", "x" * 5000, "model.norm.weight/../..")
_NUMBERS = (-1, 0, 2**31, 2**63, 2**64, 10**30, 1.5, None, "1", [], {}, True)


def header_of(raw):
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header, data):
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def truncate(rng, raw):
    return raw[: rng.randrange(len(raw))]


def flip_header(rng, raw):
    out = bytearray(raw)
    length = struct.unpack("<Q", raw[:8])[0]
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    return bytes(out)


def length_of_header(rng, raw):
    return (
        struct.pack("<Q", rng.choice((0, 1, 2**63, 2**64 - 1, len(raw), rng.getrandbits(40))))
        + raw[8:]
    )


def rename(rng, raw):
    header, data = header_of(raw)
    name = rng.choice([n for n in header if n != "__metadata__"])
    header[rng.choice(_NAMES)] = header.pop(name)
    return with_header(header, data)


def absurd_entry(rng, raw):
    header, data = header_of(raw)
    entry = header[rng.choice([n for n in header if n != "__metadata__"])]
    field = rng.choice(("shape", "data_offsets", "dtype"))
    if field == "dtype":
        entry[field] = rng.choice(("I8", "F64", "F8_E4M3", "", None, 3, "x" * 10_000))
    else:
        entry[field] = rng.choice(
            ([rng.choice(_NUMBERS)], [rng.choice(_NUMBERS)] * 2, [2**40] * 8, [1] * 5000, None)
        )
    return with_header(header, data)


def nested(rng, raw):
    depth = rng.choice((100, 100_000))
    encoded = b"[" * depth + b"]" * depth
    return struct.pack("<Q", len(encoded)) + encoded


def config_field(rng, raw):
    config = dict(CONFIG)
    field = rng.choice([k for k in config if k not in ("bos_token_id", "eos_token_id")])
    config[field] = rng.choice([v for v in _NUMBERS if v != config[field]])
    return config


DAMAGE = (truncate, flip_header, length_of_header, rename, absurd_entry, nested, config_field)


def fuzz(tmp_path, capsys, cases, seed):
    """Converts damaged checkpoints into one zoo.

    Returns:
      How many were refused. The others were whole in spite of the damage (a flipped bit in the
      metadata, a field that may be absent).
    """
    rng = random.Random(seed)
    cli = Cli(tmp_path / "work" / "zoo", capsys)
    source = tiny.write_checkpoint(tmp_path / "work" / "src")
    good = (source / "model.safetensors").read_bytes()
    cli.ok("hf", source, "--name", "good")
    before = tiny.files_of(tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for i in range(cases):
        damage = DAMAGE[i % len(DAMAGE)]
        (source / "config.json").write_text(json.dumps(CONFIG))
        (source / "model.safetensors").write_bytes(good)
        out = damage(rng, good)
        if isinstance(out, bytes):
            (source / "model.safetensors").write_bytes(out)
        else:
            (source / "config.json").write_text(json.dumps(out))
        signal.alarm(20)
        result = cli("hf", source, "--name", "bad", "--quiet")
        signal.alarm(0)
        assert result.code in (0, 2), (i, damage.__name__, result)
        if result.code == 2:
            refused += 1
            assert result.err.startswith("jblock-convert: error: "), (i, damage.__name__)
            assert "Traceback" not in result.err
        else:
            cli.ok("rm", "bad")
            cli.ok("gc", "--delete")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 300_000  # KiB
    (source / "config.json").write_text(json.dumps(CONFIG))
    (source / "model.safetensors").write_bytes(good)
    after = tiny.files_of(tmp_path)
    # A name that was used keeps its numbers, so that none is given twice.
    skipped = ("/locks/", "/chains/bad/")
    assert {k: v for k, v in after.items() if not any(s in k for s in skipped)} == {
        k: v for k, v in before.items() if not any(s in k for s in skipped)
    }
    return refused


def test_a_hundred(tmp_path, capsys):
    assert fuzz(tmp_path, capsys, cases=105, seed=1) > 80


@pytest.mark.long
def test_ten_thousand(tmp_path, capsys):
    assert fuzz(tmp_path, capsys, cases=10_000, seed=2) > 8_000
