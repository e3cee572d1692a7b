"""`jblock.v1` only grows: what a client was built against stays as it was.

tests/fixtures/jblock_v1.binpb is the API as it was promised. After a change that only adds, take it up:
python -m tests.serving.test_api_is_kept
"""

from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from serving.v1 import jblock_pb2

PROMISED = Path(__file__).parent.parent / "fixtures" / "jblock_v1.binpb"


def promised():
    return descriptor_pb2.FileDescriptorProto.FromString(PROMISED.read_bytes())


def broken(before, after):
    """What a client of `before` would miss in `after`."""
    found = []
    for kind in ("message_type", "enum_type", "service"):
        now = {d.name: d for d in getattr(after, kind)}
        for old in getattr(before, kind):
            new = now.get(old.name)
            found += [f"{old.name} is gone"] if new is None else _broken(kind, old, new)
    return found


def _broken(kind, old, new):
    if kind == "message_type":
        fields = {f.number: f for f in new.field}
        reserved = [r for r in new.reserved_range]
        for field in old.field:
            other = fields.get(field.number)
            if other is None:
                yield f"{old.name}.{field.name} is gone"
            elif _shape(field) != _shape(other):
                yield f"{old.name}.{field.name} is {_shape(other)}, it was {_shape(field)}"
        for area in old.reserved_range:
            if not any(r.start <= area.start and area.end <= r.end for r in reserved):
                yield f"{old.name} reserves {area.start} no more"
        nested = {d.name: d for d in new.nested_type}
        for inner in old.nested_type:
            yield from _broken(kind, inner, nested[inner.name])
    elif kind == "enum_type":
        values = {v.number: v.name for v in new.value}
        for value in old.value:
            if values.get(value.number) != value.name:
                yield f"{old.name}.{value.name} is {values.get(value.number)}"
    else:
        methods = {m.name: m for m in new.method}
        for method in old.method:
            if methods.get(method.name) != method:
                yield f"{old.name}.{method.name} is {methods.get(method.name)}"


def _shape(field):
    return (field.name, field.type, field.label, field.type_name, field.proto3_optional)


def now():
    file = descriptor_pb2.FileDescriptorProto()
    jblock_pb2.DESCRIPTOR.CopyToProto(file)
    return file


def test_nothing_that_was_promised_is_gone():
    assert broken(promised(), now()) == []
    # What was added is taken up, so that it is promised from now on.
    assert broken(now(), promised()) == []


def change(name, act):
    return pytest.param(act, id=name)


@pytest.mark.parametrize(
    "act",
    [
        change("message", lambda f: f.message_type.pop(0)),
        change("field", lambda f: f.message_type[0].field.pop(0)),
        change("number", lambda f: setattr(f.message_type[0].field[0], "number", 99)),
        change("name", lambda f: setattr(f.message_type[0].field[0], "name", "other")),
        change("type", lambda f: setattr(f.message_type[0].field[0], "type", 3)),
        change("value", lambda f: setattr(f.enum_type[0].value[1], "name", "OTHER")),
        change("method", lambda f: f.service[0].method.pop(0)),
        change("stream", lambda f: setattr(f.service[0].method[0], "server_streaming", True)),
        change("reserved", lambda f: [m.ClearField("reserved_range") for m in f.message_type]),
    ],
)
def test_a_breaking_change_is_seen(act):
    file = promised()
    act(file)
    assert broken(promised(), file)


if __name__ == "__main__":
    PROMISED.write_bytes(now().SerializeToString(deterministic=True))
