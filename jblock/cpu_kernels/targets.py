"""Custom call targets whose name says what they compute, compiled when first asked for.

A name is `jblock:KERNEL:FIELD:...:;`. So an executable from the cache names all that must be registered
before it is loaded, and nothing else has to be kept with it.
"""

import ctypes
import functools
import importlib
import importlib.util
import platform
import re
import threading
from typing import Any

import jax
from absl import logging

_KERNELS = {
    "attend": "jblock.cpu_kernels.paged_attention.kernel",
    "matmul": "jblock.cpu_kernels.matmul.kernel",
    "delta": "jblock.cpu_kernels.grouped_delta_matmul",
}
"""The module that emits each kernel: `emit(module, name, fields)` adds the function `name`."""

_NAME = re.compile(rb"jblock:[a-z0-9_.:-]+;")
_PRCTL, _ASK_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_lock = threading.Lock()
_ready: dict[str, Any] = {}


@functools.cache
def available() -> bool:
    """Whether kernels can be compiled here: llvmlite is installed and jaxlib's FFI is as it must be.
    What is missing is logged, once."""
    if importlib.util.find_spec("llvmlite") is None:
        logging.info(
            "llvmlite is not installed: XLA's own code serves the CPU (pip install jblock[cpu])"
        )
        return False
    from jblock.cpu_kernels import ffi

    try:
        at = ffi.layout()
        for needed in (
            *("CallFrame.ctx", "Buffer.dims", "InternalExtension.type"),
            "Api.XLA_FFI_ThreadPool_Schedule",
        ):
            at(needed)
        for needed in ("ExecutionStage_EXECUTE", "Extension_Metadata"):
            at.number(needed)
    except ffi.Unsupported as e:
        logging.warning("XLA's own code serves the CPU: %s", e)
        return False
    if not has_fma():
        logging.warning("XLA's own code serves the CPU: it has no instruction for x * y + z (FMA)")
        return False
    return True


def target(kernel: str, *fields: str | int) -> str:
    """The name of a kernel's variant, registered and ready to be called."""
    name = ":".join(("jblock", kernel, *map(str, fields), ";"))
    _prepare(name)
    return name


def prepare_named(body: bytes) -> None:
    """Registers every target that a serialized executable names."""
    for name in sorted(set(_NAME.findall(body))):
        _prepare(name.decode())


def _prepare(name: str) -> None:
    with _lock:
        if name not in _ready:
            _ready[name] = _compile(name)


def _compile(name: str) -> Any:
    """Registers a target; what it returns must live as long as the process."""
    from llvmlite import ir

    _, kernel, *fields, _ = name.split(":")
    module = ir.Module(name=name)
    importlib.import_module(_KERNELS[kernel]).emit(module, "entry", fields)
    engine, address = machine_code(module)
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p,) * 3
    jax.ffi.register_ffi_target(name, capsule(address, None, None), platform="cpu")
    return engine


def machine_code(module: Any) -> tuple[Any, int]:
    """Compiles a module: what must live as long as its code is used, and the address of `entry`."""
    import llvmlite.binding as llvm

    engine = _engine()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    # LLVM's passes over the code would take longer than all else and gain nothing: what can be shared or
    # kept in a register is written so.
    engine.add_module(parsed)
    engine.finalize_object()
    return (engine, parsed), engine.get_function_address("entry")


def _engine() -> Any:
    """A just-in-time compiler for this CPU."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    # Some CPUs are tuned for 256 bits, whatever width the code has.
    text = ",".join(filter(None, (features.flatten(), "-prefer-256-bit" * has_avx512())))
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=text, opt=3, jit=True
    )
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


@functools.cache
def has_fma() -> bool:
    """Whether x * y + z is one instruction: without it LLVM calls a function for each element."""
    import llvmlite.binding as llvm

    if platform.machine().lower() in ("x86_64", "amd64"):
        return bool(llvm.get_host_cpu_features().get("fma"))
    return platform.machine().lower() in ("aarch64", "arm64")


@functools.cache
def has_avx512() -> bool:
    """Whether this CPU has it."""
    import llvmlite.binding as llvm

    return bool(llvm.get_host_cpu_features().get("avx512f"))


@functools.cache
def has_avx512_bf16() -> bool:
    """Whether this CPU has AVX-512's product of pairs of bfloat16."""
    import llvmlite.binding as llvm

    return has_avx512() and bool(llvm.get_host_cpu_features().get("avx512bf16"))


@functools.cache
def vector_width() -> int:
    """float32 values of a vector register."""
    import llvmlite.binding as llvm

    return 16 if has_avx512() else 8 if llvm.get_host_cpu_features().get("avx2") else 4


def accumulators() -> int:
    """Vector registers that a product may sum in; the rest hold what is multiplied."""
    return 10 if vector_width() == 8 else 24


@functools.cache
def has_amx() -> bool:
    """Whether this process may use AMX's bfloat16 tiles: Linux has to be asked before the first one."""
    import llvmlite.binding as llvm

    if platform.system() != "Linux" or not llvm.get_host_cpu_features().get("amx-bf16"):
        return False
    return ctypes.CDLL(None).syscall(_PRCTL, _ASK_PERMISSION, _TILE_DATA) == 0
