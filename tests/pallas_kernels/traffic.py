"""Counts what a Pallas TPU kernel does: every copy, product and grid step, by walking its program.

`count(fn, *args)` runs the jaxpr of `fn` with integers computed and floats left out: what decides control
flow (lengths, page tables, loop bounds, program ids) is followed exactly, branch by branch and
iteration by iteration, while blocks of numbers are only shapes. So shapes of real models are counted in
seconds, and the count is of what the kernel would do, not of what its author says. It knows
no kernel in particular: explicit copies (`make_async_copy`), copies of BlockSpec pipelines (a block is
fetched when its index changes, an output is written back when it does), `dot_general`, `cond`,
`while`, `scan`. A primitive that would make the count wrong if passed over is an error.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

_FORGIVEN = ("semaphore_signal", "semaphore_wait", "delay", "debug_print", "check")


@dataclasses.dataclass
class Traffic:
    """What was counted.

    Attributes:
      copied: bytes copied inside kernels, by (from, to) memory space: "hbm", "vmem", "smem".
      copies: copies inside kernels.
      flops: of products inside kernels, 2 a multiply and add.
      outside_flops: of products that XLA does around them.
      grid_steps: of kernels.
      staged: bytes of the arrays that XLA makes for kernels or takes from them: operands and results that
        are in HBM and are not updated in place.
    """

    copied: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    copies: int = 0
    flops: int = 0
    outside_flops: int = 0
    grid_steps: int = 0
    staged: int = 0

    @property
    def hbm_bytes(self) -> int:
        """Bytes that kernels read from HBM or write to it."""
        return sum(n for pair, n in self.copied.items() for space in pair if space == "hbm")


@dataclasses.dataclass(frozen=True)
class _Unknown:
    """A value of which only the shape and dtype are known."""

    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class _Ref:
    """A buffer. `data` is kept only for integers in SMEM."""

    space: str
    shape: tuple[int, ...]
    dtype: Any
    data: np.ndarray | None = None


def count(fn: Callable, *args: Any) -> Traffic:
    """Counts one call.

    Args:
      fn: a traceable function that calls kernels of jax.experimental.pallas.tpu.
      args: numpy arrays for what decides control flow, jax.ShapeDtypeStruct for the rest.
    """
    closed = jax.make_jaxpr(fn)(*args)
    walk = _Walk()
    values = [
        a if isinstance(a, np.ndarray) else _Unknown(a.shape, a.dtype)
        for a in jax.tree.leaves(args)
    ]
    walk.run(closed.jaxpr, closed.consts, values)
    return walk.traffic


class _Walk:
    def __init__(self) -> None:
        self.traffic = Traffic()
        self._in_kernel = False
        self._grid: tuple[int, ...] = ()
        self._step: tuple[int, ...] = ()

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = {}

        def read(v):
            return np.asarray(v.val) if hasattr(v, "val") else env[v]

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            outs = _COUNTED.get(eqn.primitive.name, _Walk._other)(self, eqn, values)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    # Values.

    def _other(self, eqn: Any, values: list[Any]) -> list[Any]:
        inner = [p for p in eqn.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        if eqn.primitive.name in ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call"):
            (closed,) = inner
            return self.run(closed.jaxpr, closed.consts, values)
        if inner:
            raise NotImplementedError(f"traffic of {eqn.primitive.name} is not counted")
        if any(isinstance(v, _Ref) for v in values):
            if eqn.primitive.name in _FORGIVEN:
                return [self._unknown(v) for v in eqn.outvars]
            raise NotImplementedError(f"what {eqn.primitive.name} does to a buffer is not counted")
        known = all(isinstance(v, np.ndarray | np.generic) for v in values)
        if self._in_kernel:  # blocks of integers are masks: no need of them
            known = known and all(v.aval.shape == () for v in eqn.outvars)
        if not known:
            return [self._unknown(v) for v in eqn.outvars]
        fast = _FAST.get(eqn.primitive.name)
        if fast and all(v.shape == () for v in values):
            return [np.asarray(fast(*values), eqn.outvars[0].aval.dtype)]
        with jax.ensure_compile_time_eval():
            out = eqn.primitive.bind(*values, **eqn.params)
        return [np.asarray(o) for o in (out if eqn.primitive.multiple_results else [out])]

    @staticmethod
    def _unknown(var: Any) -> _Unknown:
        return _Unknown(getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None))

    def _program_id(self, eqn: Any, values: list[Any]) -> list[Any]:
        return [np.int32(self._step[eqn.params["axis"]])]

    def _num_programs(self, eqn: Any, values: list[Any]) -> list[Any]:
        return [np.int32(self._grid[eqn.params["axis"]])]

    # Control flow.

    def _cond(self, eqn: Any, values: list[Any]) -> list[Any]:
        index = _decided(eqn, values[0])
        branches = eqn.params["branches"]
        branch = branches[min(max(index, 0), len(branches) - 1)]
        return self.run(branch.jaxpr, branch.consts, values[1:])

    def _while(self, eqn: Any, values: list[Any]) -> list[Any]:
        p = eqn.params
        n, m = p["cond_nconsts"], p["body_nconsts"]
        test, body, carry = values[:n], values[n : n + m], values[n + m :]
        cond_jaxpr, body_jaxpr = p["cond_jaxpr"], p["body_jaxpr"]
        while _decided(eqn, self.run(cond_jaxpr.jaxpr, cond_jaxpr.consts, [*test, *carry])[0]):
            carry = self.run(body_jaxpr.jaxpr, body_jaxpr.consts, [*body, *carry])
        return carry

    def _scan(self, eqn: Any, values: list[Any]) -> list[Any]:
        p = eqn.params
        if "num_consts" in p:
            n, m = p["num_consts"], p["num_carry"]
        else:  # jax 0.12
            n, m = (len(part.vals) for part in p["ft_in"].elts[:2])
        if len(values) > n + m or len(eqn.outvars) > m:
            if self._in_kernel:
                raise NotImplementedError("a scan over arrays inside a kernel is not counted")
            return [self._unknown(v) for v in eqn.outvars]
        consts, carry = values[:n], values[n:]
        for _ in range(p["length"]):
            carry = self.run(p["jaxpr"].jaxpr, p["jaxpr"].consts, [*consts, *carry])
        return carry

    # Work.

    def _dot_general(self, eqn: Any, values: list[Any]) -> list[Any]:
        (contract, _), _ = eqn.params["dimension_numbers"]
        out = eqn.outvars[0].aval
        flops = 2 * out.size * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        if self._in_kernel:
            self.traffic.flops += flops
        else:
            self.traffic.outside_flops += flops
        return [self._unknown(eqn.outvars[0])]

    def _dma_start(self, eqn: Any, values: list[Any]) -> list[Any]:
        src, dst = eqn.params["tree"].unflatten(values)[:2]
        moved = _bytes(math.prod(_region(src)), _buffer(src).dtype)
        if math.prod(_region(dst)) != math.prod(_region(src)):
            raise ValueError(f"a copy of {_region(src)} to {_region(dst)}")
        self._copy(_buffer(src).space, _buffer(dst).space, moved)
        return []

    def _dma_wait(self, eqn: Any, values: list[Any]) -> list[Any]:
        return []

    def _copy(self, src: str, dst: str, moved: int) -> None:
        self.traffic.copied[src, dst] += moved
        self.traffic.copies += 1

    def _get(self, eqn: Any, values: list[Any]) -> list[Any]:
        ref, *flat = values
        if ref.data is None or eqn.outvars[0].aval.shape:
            return [self._unknown(eqn.outvars[0])]
        return [ref.data[self._index(eqn, ref, flat)]]

    def _swap(self, eqn: Any, values: list[Any]) -> list[Any]:
        ref, value, *flat = values
        if ref.data is None:
            return [self._unknown(eqn.outvars[0])]
        index = self._index(eqn, ref, flat)
        old = ref.data[index].copy()
        ref.data[index] = _known(eqn, value)
        return [old]

    def _masked_swap(self, eqn: Any, values: list[Any]) -> list[Any]:
        if values[0].data is not None:
            raise NotImplementedError("masked stores of integers are not followed")
        return [self._unknown(eqn.outvars[0])]

    @staticmethod
    def _index(eqn: Any, ref: _Ref, flat: list[Any]) -> Any:
        transforms = jax.tree.unflatten(eqn.params["tree"], flat)
        if not transforms:
            return ...
        (indexer,) = transforms
        return tuple(int(_known(eqn, i)) for i in indexer.indices)

    # Kernels.

    def _pallas_call(self, eqn: Any, values: list[Any]) -> list[Any]:
        if self._in_kernel:
            raise NotImplementedError("a kernel inside a kernel is not counted")
        mapping, jaxpr = eqn.params["grid_mapping"], eqn.params["jaxpr"]
        dynamic = iter(values[: mapping.num_dynamic_grid_bounds])
        grid = tuple(
            g if isinstance(g, int) else int(_known(eqn, next(dynamic))) for g in mapping.grid
        )
        operands = values[mapping.num_dynamic_grid_bounds :]
        scalars = [
            _Ref("smem", a.shape, a.dtype, a if isinstance(a, np.ndarray) else None)
            for a in operands[: mapping.num_index_operands]
        ]
        refs = [
            _Ref(_space(v.aval), v.aval.shape, v.aval.dtype) for v in jaxpr.invars[len(scalars) :]
        ]
        blocks = mapping.num_inputs + mapping.num_outputs
        refs[blocks:] = [
            dataclasses.replace(r, data=np.zeros(r.shape, r.dtype)) if _holds_ints(r) else r
            for r in refs[blocks:]
        ]
        self._count_staged(eqn, operands, mapping)
        at: list[Any] = [None] * blocks
        self._in_kernel, self._grid = True, grid
        for step in np.ndindex(*grid):
            self._step = step
            self.traffic.grid_steps += 1
            for i, block in enumerate(mapping.block_mappings):
                self._pipeline(eqn, i, block, at, step, scalars, output=i >= mapping.num_inputs)
            self.run(jaxpr, (), [*scalars, *refs])
        self._in_kernel = False
        return [self._unknown(v) for v in eqn.outvars]

    def _count_staged(self, eqn: Any, operands: Sequence[Any], mapping: Any) -> None:
        aliases = dict(eqn.params["input_output_aliases"])
        shift = mapping.num_dynamic_grid_bounds
        kept = [
            v.aval
            for i, v in enumerate(eqn.invars)
            if i >= shift + mapping.num_index_operands and i - shift not in aliases
        ]
        kept += [v.aval for i, v in enumerate(eqn.outvars) if i not in aliases.values()]
        self.traffic.staged += sum(_bytes(a.size, a.dtype) for a in kept)

    def _pipeline(self, eqn, i, block, at, step, scalars, *, output: bool) -> None:
        """The copy of one operand that the pipeline of BlockSpecs makes before a step."""
        if _space(block.block_aval) != "vmem":
            return
        args = [*(np.int32(s) for s in step), *scalars]
        closed = block.index_map_jaxpr
        index = tuple(int(_known(eqn, v)) for v in self.run(closed.jaxpr, closed.consts, args))
        if index != at[i]:
            at[i] = index
            aval = block.block_aval
            moved = _bytes(math.prod(aval.shape), aval.dtype)
            self._copy(*(("vmem", "hbm") if output else ("hbm", "vmem")), moved)


def _bytes(values: int, dtype: Any) -> int:
    """Of that many values in memory: numpy gives those of 4 bits a byte each, a TPU half of one."""
    bits = 4 if np.dtype(dtype).name in ("int4", "uint4") else 8 * np.dtype(dtype).itemsize
    return values * bits // 8


def _space(aval: Any) -> str:
    """Where a buffer lies; one without a space of its own is a block that a pipeline brings to VMEM."""
    name = str(getattr(aval, "memory_space", None)).lower().rsplit(".", 1)[-1]
    known = {
        "none": "vmem",
        "default": "vmem",
        "any": "hbm",
        "hbm": "hbm",
        "vmem": "vmem",
        "smem": "smem",
    }
    return "semaphore" if "sem" in name and name != "smem" else known[name]


def _holds_ints(ref: _Ref) -> bool:
    return ref.space == "smem" and np.issubdtype(ref.dtype, np.integer)


def _buffer(ref: Any) -> _Ref:
    return ref if isinstance(ref, _Ref) else ref.ref


def _region(ref: Any) -> tuple[int, ...]:
    """Shape of the part of a buffer that a reference names."""
    if isinstance(ref, _Ref):
        return ref.shape
    shape = ref.ref.shape
    for indexer in ref.transforms:
        if not hasattr(indexer, "indices"):
            raise NotImplementedError(f"a copy through {type(indexer).__name__} is not counted")
        shape = tuple(
            int(i.size) for i in indexer.indices if hasattr(i, "size") and hasattr(i, "stride")
        )
    return shape


def _known(eqn: Any, value: Any) -> Any:
    if isinstance(value, _Unknown):
        raise ValueError(f"{eqn.primitive.name} depends on numbers that are left out: {value}")
    return value


def _decided(eqn: Any, value: Any) -> int:
    return int(_known(eqn, value))


_FAST = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "max": max,
    "min": min,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "not": lambda a: ~a,
    "sign": np.sign,
    "rem": lambda a, b: np.fmod(a, b),
    "div": lambda a, b: int(a / b),  # towards zero, exact under 2^53
    "convert_element_type": lambda a: a,
    "select_n": lambda which, *cases: cases[int(which)],
}


_COUNTED: dict[str, Callable[[_Walk, Any, list[Any]], list[Any]]] = {
    "program_id": _Walk._program_id,
    "num_programs": _Walk._num_programs,
    "cond": _Walk._cond,
    "while": _Walk._while,
    "scan": _Walk._scan,
    "dot_general": _Walk._dot_general,
    "dma_start": _Walk._dma_start,
    "dma_wait": _Walk._dma_wait,
    "get": _Walk._get,
    "swap": _Walk._swap,
    "masked_swap": _Walk._masked_swap,
    "pallas_call": _Walk._pallas_call,
}
"""Of the primitives that count, or that only the walk can follow."""
