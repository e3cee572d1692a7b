"""XLA's FFI from generated code: how its structs lie, and functions that it can call.

The layout is read from the C header that the jaxlib at hand brings along, so a jaxlib that moved a field
moves it here too, and one that lacks a field is refused (`Unsupported`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from llvmlite import ir

from jblock.cpu_kernels.emit import I32, I64, PTR, Function, Value

_SIZES = {"size_t": 8, "int64_t": 8, "int": 4, "int32_t": 4, "uint32_t": 4}


class Unsupported(RuntimeError):
    """This jaxlib's FFI is not as it must be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What a header says; names are without their prefix XLA_FFI_.

    Attributes:
      offsets: in bytes, by "struct.field", nested structs resolved.
      sizes: in bytes, by struct.
      enums: the number of each enumerator, such as "ExecutionStage_EXECUTE".
      major, minor: version of the header.
    """

    offsets: dict[str, int]
    sizes: dict[str, int]
    enums: dict[str, int]
    major: int
    minor: int

    def __call__(self, path: str) -> int:
        """Offset of a field. Raises Unsupported if there is none."""
        try:
            return self.offsets[path]
        except KeyError:
            raise Unsupported(f"jaxlib's FFI header has no {path}") from None

    def number(self, enumerator: str) -> int:
        """The number of an enumerator. Raises Unsupported if there is none."""
        try:
            return self.enums[enumerator]
        except KeyError:
            raise Unsupported(f"jaxlib's FFI header has no {enumerator}") from None


@functools.cache
def layout() -> Layout:
    """That of the jaxlib at hand. Raises Unsupported: its header is missing or not understood."""
    path = Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    try:
        return parse(path.read_text())
    except OSError as e:
        raise Unsupported(f"jaxlib's FFI header {str(path)!r} cannot be read: {e}") from e


def parse(header: str) -> Layout:
    """Lays out the structs of a header whose fields are pointers, integers, enums and such structs.

    Raises:
      Unsupported: it holds something else.
    """
    text = re.sub(r"//.*", "", header)
    # As the FFI's version 0.3 (jax 0.10) calls it, and 0.5 (jax 0.12).
    text = text.replace("XLA_FFI_Extension_Base", "XLA_FFI_InternalExtension")
    definitions = re.findall(r"typedef enum\s*\{([^}]*)\}\s*(\w+)\s*;", text)
    enums = {name for _, name in definitions}
    numbers: dict[str, int] = {}
    for body, _ in definitions:
        following = 0  # C numbers an enumerator without a value one above the one before it.
        for enumerator in filter(str.strip, body.split(",")):
            name, _, value = map(str.strip, enumerator.partition("="))
            try:
                numbers[name] = following = int(value or str(following), 0)
            except ValueError:
                raise Unsupported(f"jaxlib's FFI header numbers {name} by {value!r}") from None
            following += 1
    aliases = {b: a for a, b in re.findall(r"typedef (\w+) (\w+);", text)}
    bodies = dict(re.findall(r"struct (\w+) \{([^}]*)\}", text))
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}

    def size(kind: str) -> int:
        kind = aliases.get(kind, kind)
        if kind in _SIZES:
            return _SIZES[kind]
        if kind in enums:
            return 4
        if kind not in sizes:
            if kind not in bodies:
                raise Unsupported(f"jaxlib's FFI header has a field of unknown type {kind}")
            lay(kind)
        return sizes[kind]

    def lay(name: str) -> None:
        end, align = 0, 1
        for declaration in bodies[name].split(";"):
            if not declaration.strip():
                continue
            member = re.search(r"_XLA_FFI_API_STRUCT_FIELD\((\w+)\)", declaration)
            if member or "*" in declaration:
                kind, width = "*", 8
                field = member[1] if member else re.findall(r"\w+", declaration)[-1]
                if "(*" in declaration:  # a function
                    field = re.findall(r"\(\*(\w+)\)", declaration)[0]
            else:
                kind, field = declaration.split()[-2:]
                width = size(kind)
            step = min(8, width)  # nested structs hold pointers or int64
            end = -(-end // step) * step
            offsets[f"{name}.{field}"] = end
            end, align = end + width, max(align, step)
        sizes[name] = -(-end // align) * align

    for name in bodies:
        if name not in sizes:
            lay(name)
    versions = dict(re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text))
    if len(versions) != 2:
        raise Unsupported("jaxlib's FFI header has no version")
    prefix = "XLA_FFI_"
    return Layout(
        offsets={k.removeprefix(prefix): v for k, v in offsets.items()},
        sizes={k.removeprefix(prefix): v for k, v in sizes.items()},
        enums={k.removeprefix(prefix): v for k, v in numbers.items()},
        major=int(versions["MAJOR"]),
        minor=int(versions["MINOR"]),
    )


@dataclasses.dataclass(frozen=True)
class Pool:
    """What a call needs to reach XLA's threads."""

    api: Value
    context: Value


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An argument or result: its data, and its dimensions (int64)."""

    data: Value
    dims: Value


class Buffers:
    """The arguments or the results of a call.

    Attributes:
      array: where the pointers to them lie.
      count: how many there are (int64).
    """

    def __init__(self, f: Function, list_: Value, which: str, field: str):
        at = layout()
        self.array = f.pointer(list_, at(f"{which}.{field}"))
        self.count = f.b.load(f.at(list_, at(f"{which}.size")), typ=I64)

    def get(self, f: Function, i: Value | int) -> Buffer:
        """One of them."""
        return buffer_at(f, self.array, i)


def buffer_at(f: Function, array: Value, i: Value | int) -> Buffer:
    """Element i of `Buffers.array`."""
    at = layout()
    buffer = f.b.load(f.at(array, i, 8), typ=PTR)
    return Buffer(f.pointer(buffer, at("Buffer.data")), f.pointer(buffer, at("Buffer.dims")))


def handler(
    module: ir.Module,
    name: str,
    num_args: int,
    num_results: int,
    body: Callable[[Function, Sequence[Buffer], Sequence[Buffer], Pool], None],
) -> None:
    """Adds the function `name` that XLA calls: `body` emits what it does with its buffers."""

    def listed(f: Function, args: Buffers, results: Buffers, pool: Pool) -> None:
        of = lambda buffers, count: [buffers.get(f, i) for i in range(count)]
        body(f, of(args, num_args), of(results, num_results), pool)

    open_handler(module, name, listed)


def open_handler(
    module: ir.Module, name: str, body: Callable[[Function, Buffers, Buffers, Pool], None]
) -> None:
    """`handler` of as many buffers as a call brings."""
    at = layout()
    f = Function(module, name, "p", PTR)
    frame = f.args[0]
    null = ir.Constant(PTR, None)

    def answer() -> None:
        """XLA asks for the version at registration."""
        extension = f.pointer(frame, at("CallFrame.extension_start"))
        with f.b.if_then(f.b.icmp_unsigned("!=", extension, null)):
            kind = f.b.load(f.at(extension, at("InternalExtension.type")), typ=I32)
            with f.b.if_then(f.b.icmp_unsigned("==", kind, I32(at.number("Extension_Metadata")))):
                metadata = f.pointer(extension, at("Metadata_Extension.metadata"))
                version = at("Metadata.api_version")
                f.store(I32(at.major), metadata, version + at("Api_Version.major_version"))
                f.store(I32(at.minor), metadata, version + at("Api_Version.minor_version"))
                f.store(I32(0), metadata, at("Metadata.traits"))
                f.b.ret(null)

    answer()
    stage = f.b.load(f.at(frame, at("CallFrame.stage")), typ=I32)
    with f.b.if_then(f.b.icmp_unsigned("!=", stage, I32(at.number("ExecutionStage_EXECUTE")))):
        f.b.ret(null)

    args = Buffers(f, f.at(frame, at("CallFrame.args")), "Args", "args")
    results = Buffers(f, f.at(frame, at("CallFrame.rets")), "Rets", "rets")
    pool = Pool(
        api=f.pointer(frame, at("CallFrame.api")), context=f.pointer(frame, at("CallFrame.ctx"))
    )
    body(f, args, results, pool)
    f.end(null)


def call_api(f: Function, pool: Pool, name: str, **fields: Value) -> Value:
    """Calls a function of XLA's API with a struct of arguments; returns the error, null if none."""
    at = layout()
    args = f"{name}_Args"
    size = at.sizes[args]
    struct = f.scratch(size)
    f.store(I64(size), struct, at(f"{args}.struct_size"))
    f.store(ir.Constant(PTR, None), struct, at(f"{args}.extension_start"))
    if f"{args}.ctx" in at.offsets:
        f.store(pool.context, struct, at(f"{args}.ctx"))
    for field, value in fields.items():
        f.store(value, struct, at(f"{args}.{field}"))
    function = f.function_at(pool.api, at(f"Api.XLA_FFI_{name}"), PTR, PTR)
    return f.b.call(function, [struct])
