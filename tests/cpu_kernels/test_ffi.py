"""What machine code for the CPU is made of: arithmetic, XLA's FFI, and targets that outlive a process."""

import ctypes
import dataclasses
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip("llvmlite", reason="the extra jblock[cpu] is not installed")

from llvmlite import ir

from jblock.cpu_kernels import ffi, targets
from jblock.cpu_kernels.emit import I64, Function
from jblock.pallas_kernels import backends


def compiled(operation: str):
    """The operation of emit.Function on whole float32 arrays."""
    module = ir.Module()
    f = Function(module, "entry", "ppl")
    source, to, count = f.args
    width = targets.vector_width()

    def step(i):
        at = f.b.mul(i, I64(width))
        f.put(getattr(f, operation)(f.load(source, at, width)), to, at)

    f.loop(count, step)
    f.end()
    engine, address = targets.machine_code(module)

    def apply(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(address)
        function(x.ctypes.data, out.ctypes.data, x.size // width)
        assert engine is not None
        return out

    return apply


def test_exp_is_within_2e7():
    x = np.concatenate([np.linspace(-87.3, 0, 160_000), np.linspace(0, 40, 32_000)])
    x = x.astype(np.float32)
    wanted = np.exp(x.astype(np.float64))
    got = compiled("exp")(x)
    assert np.abs(got / wanted - 1).max() < 2e-7
    edges = np.array([0, -0.0, -88, -1e30, np.nan, -np.inf, 1, 2] * 2, np.float32)
    got = compiled("exp")(edges)
    assert got[0] == got[1] == 1 and not got[2:4].any() and np.isnan(got[4]) and got[5] == 0


def test_tanh_is_within_4e7():
    x = np.concatenate([np.linspace(-12, 12, 160_000), np.geomspace(1e-20, 1, 16_000)])
    x = x.astype(np.float32)
    got = compiled("tanh")(x)
    wanted = np.tanh(x.astype(np.float64))
    assert np.abs(got - wanted)[wanted != 0].max() < 4e-7
    assert np.abs(got / np.where(wanted == 0, 1, wanted) - 1)[wanted != 0].max() < 4e-7
    assert np.isnan(compiled("tanh")(np.full(16, np.nan, np.float32))).all()


HEADER = """
typedef enum { A_ONE = 1, XLA_FFI_A_TWO, A_NINE = 0x9, } A;
typedef uint32_t Traits;
#define XLA_FFI_API_MAJOR 0
#define XLA_FFI_API_MINOR 7
struct XLA_FFI_Inner { size_t struct_size; int major; A kind; // a comment; with a semicolon
};
struct XLA_FFI_Outer { Traits traits; XLA_FFI_Inner inner; void** list; };
struct XLA_FFI_Api { size_t struct_size; _XLA_FFI_API_STRUCT_FIELD(XLA_FFI_Go); };
"""


def test_structs_are_laid_out_as_c_does():
    at = ffi.parse(HEADER)
    assert (at.major, at.minor) == (0, 7)
    offsets = [at(f"Outer.{f}") for f in ("traits", "inner", "list")]
    assert offsets == [0, 8, 24] and at.sizes["Outer"] == 32
    assert at("Inner.kind") == 12 and at("Api.XLA_FFI_Go") == 8
    assert [at.number(n) for n in ("A_ONE", "A_TWO", "A_NINE")] == [1, 2, 9]


def test_a_header_that_changed_is_refused():
    with pytest.raises(ffi.Unsupported, match=r"no Outer\.gone"):
        ffi.parse(HEADER)("Outer.gone")
    with pytest.raises(ffi.Unsupported, match="no ExecutionStage_EXECUTE"):
        ffi.parse(HEADER).number("ExecutionStage_EXECUTE")
    with pytest.raises(ffi.Unsupported, match="numbers A_NINE by 'MANY'"):
        ffi.parse(HEADER.replace("0x9", "MANY"))
    with pytest.raises(ffi.Unsupported, match="unknown type Strange"):
        ffi.parse(HEADER.replace("Traits traits", "Strange traits"))
    with pytest.raises(ffi.Unsupported, match="no version"):
        ffi.parse(HEADER.replace("#define", "#undef"))


@pytest.mark.parametrize("number", [3, 7])
def test_code_runs_in_the_stage_that_the_header_numbers(monkeypatch, number):
    real = ffi.layout()
    moved = dataclasses.replace(real, enums=real.enums | {"ExecutionStage_EXECUTE": number})
    monkeypatch.setattr(ffi, "layout", lambda: moved)
    module = ir.Module()
    ffi.handler(module, "entry", 0, 0, lambda *_: None)
    compared = re.findall(r"icmp ne i32 .*, (\d+)", str(module))
    assert compared == [str(number)]


def test_a_cpu_without_fma_is_xlas(monkeypatch):
    targets.available.cache_clear()
    monkeypatch.setattr(targets, "has_fma", lambda: False)
    assert backends.backend_of("cpu") == "xla"
    targets.available.cache_clear()


def test_without_llvmlite_or_with_another_ffi_the_cpu_is_xlas(monkeypatch):
    def broken():
        raise ffi.Unsupported("moved")

    assert backends.backend_of("cpu") == "cpu"
    with monkeypatch.context() as patch:
        targets.available.cache_clear()
        patch.setattr(ffi, "layout", broken)
        assert backends.backend_of("cpu") == "xla"
        targets.available.cache_clear()
        patch.setattr(targets.importlib.util, "find_spec", lambda name: None)
        assert backends.backend_of("cpu") == "xla"
    targets.available.cache_clear()
    assert backends.backend_of("cpu") == "cpu" and backends.backend_of("tpu") == "tpu"


ONE_PROCESS = """
    import sys
    from pathlib import Path

    import jax, jax.numpy as jnp, numpy as np
    from jblock.engine.programs.executable_cache import ExecutableCache
    from jblock.pallas_kernels.paged_attention import api
    from jblock.pallas_kernels.paged_attention.ragged import Ragged

    cache = ExecutableCache(Path(sys.argv[1]))
    pages = tuple(jnp.ones(a.shape) for a in api.abstract_pages(5, 16, 2, 16, backend="cpu"))
    table = jnp.asarray([[1, 2], [3, 4]], jnp.int32)
    ragged = Ragged.grid(jnp.asarray([20, 7]), jnp.ones(2, jnp.int32), table, 1)
    q, k = jnp.linspace(0, 1, 2 * 4 * 16).reshape(2, 4, 16), jnp.linspace(0, 2, 64).reshape(2, 2, 16)
    program = cache.load("attend")
    if program is None:
        attend = lambda *args: api.paged_attention(*args, backend="cpu")
        program = jax.jit(attend).lower(q, k, k, pages, ragged).compile()
        cache.store("attend", program)
    out, _ = program(q, k, k, pages, ragged)
    print(cache.loaded, np.asarray(out).tobytes().hex())
"""


def test_a_program_from_the_cache_brings_its_machine_code_in_another_process(tmp_path):
    def run() -> list[str]:
        script = textwrap.dedent(ONE_PROCESS)
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()

    first, second = run(), run()
    assert (first[0], second[0]) == ("0", "1") and first[1] == second[1]
