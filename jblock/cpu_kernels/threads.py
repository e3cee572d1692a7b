"""Sharing the items of a call with XLA's own threads.

The caller and its helpers take items by a counter until none is left, so a helper that comes late or
never costs nothing, and there is nothing to wait for but items that somebody is at. A helper may come
after the call has returned: what it then looks at is in a block of its own, which the last one frees.
"""

from llvmlite import ir

from jblock.cpu_kernels import ffi
from jblock.cpu_kernels.emit import I32, I64, PTR, VOID, Function, Value

# Of a shared block, each on a cache line of its own: next item, items done, who still knows the block;
# then count, function and argument, which nobody changes.
_NEXT, _DONE, _OWNERS, _COUNT, _ITEM, _ARG, _BYTES = 0, 64, 128, 192, 200, 208, 256
_SPINS = 2000


def num_threads(f: Function, pool: ffi.Pool) -> Value:
    """Threads of XLA's pool, 1 if there is none."""
    out = f.scratch(8)
    f.store(I64(1), out)
    error = ffi.call_api(f, pool, "ThreadPool_NumThreads", num_threads=out)
    _drop(f, pool, error)
    return f.larger(f.b.load(out, typ=I64), I64(1))


def parallel_for(
    f: Function, pool: ffi.Pool, count: Value, helpers: Value, item: ir.Function, arg: Value
) -> None:
    """Runs `item(arg, i)` for i in 0 .. count - 1 and returns when all are done.

    Args:
      f: the function that is being written.
      pool: of the call.
      count: int64.
      helpers: int64, threads wanted beside the caller's; with 0 nothing but the items is run.
      item: (pointer, int64) -> nothing.
      arg: what the items share.
    """
    b, module = f.b, f.function.module
    run, task = _functions(module)
    helpers = f.smaller(helpers, b.sub(count, I64(1)))
    with b.if_else(b.icmp_signed(">", helpers, I64(0))) as (shared, alone):
        with shared:
            block = f.call(_external(module, "malloc", PTR, I64), I64(_BYTES))
            f.store(I64(0), block, _NEXT)
            f.store(I64(0), block, _DONE)
            f.store(b.add(helpers, I64(1)), block, _OWNERS)
            f.store(count, block, _COUNT)
            f.store(item, block, _ITEM)
            f.store(arg, block, _ARG)

            def send(_: Value) -> None:
                error = ffi.call_api(f, pool, "ThreadPool_Schedule", task=task, data=block)
                refused = b.icmp_unsigned("!=", error, ir.Constant(PTR, None))

                def forget() -> None:
                    _drop(f, pool, error)
                    f.call(_let_go(module), block)

                f.when(refused, forget)

            f.loop(helpers, send)
            f.call(run, block)
            _wait(f, f.at(block, _DONE), count)
            f.call(_let_go(module), block)
        with alone:
            f.loop(count, lambda i: f.call(item, arg, i) and None)


def _functions(module: ir.Module) -> tuple[ir.Function, ir.Function]:
    """(run, task), each (block) -> nothing."""
    if "threads.task" in module.globals:
        return module.globals["threads.run"], module.globals["threads.task"]
    run = Function(module, "threads.run", "p")
    (block,), b = run.args, run.b
    item = run.function_at(block, _ITEM, VOID, PTR, I64)
    arg, count = run.pointer(block, _ARG), run.b.load(run.at(block, _COUNT), typ=I64)
    turn, after = run.function.append_basic_block(), run.function.append_basic_block()
    work = run.function.append_basic_block()
    b.branch(turn)
    b.position_at_end(turn)
    i = b.atomic_rmw("add", run.at(block, _NEXT), I64(1), "acq_rel")
    b.cbranch(b.icmp_signed("<", i, count), work, after)
    b.position_at_end(work)
    b.call(item, [arg, i])
    b.atomic_rmw("add", run.at(block, _DONE), I64(1), "acq_rel")
    b.branch(turn)
    b.position_at_end(after)
    run.end()
    task = Function(module, "threads.task", "p")
    task.call(run.function, task.args[0])
    task.call(_let_go(module), task.args[0])
    task.end()
    return run.function, task.function


def _let_go(module: ir.Module) -> ir.Function:
    """(block) -> nothing: frees it if nobody else knows it."""
    if "threads.let_go" in module.globals:
        return module.globals["threads.let_go"]
    f = Function(module, "threads.let_go", "p")
    before = f.b.atomic_rmw("sub", f.at(f.args[0], _OWNERS), I64(1), "acq_rel")
    free = _external(module, "free", VOID, PTR)
    f.when(f.b.icmp_signed("==", before, I64(1)), lambda: f.call(free, f.args[0]))
    f.end()
    return f.function


def _wait(f: Function, pointer: Value, count: Value) -> None:
    """Until an int64 has reached count: looking at it for some microseconds, then giving way to others."""
    b = f.b
    before = b.block
    look, busy, more = (f.function.append_basic_block() for _ in range(3))
    after = f.function.append_basic_block()
    b.branch(look)
    b.position_at_end(look)
    turn = b.phi(I64)
    turn.add_incoming(I64(0), before)
    seen = b.load_atomic(pointer, "acquire", 8, typ=I64)
    b.cbranch(b.icmp_signed(">=", seen, count), after, busy)
    b.position_at_end(busy)
    patient = b.icmp_signed(">", turn, I64(_SPINS))
    yield_ = _external(f.function.module, "sched_yield", I32)
    f.when(patient, lambda: f.call(yield_))
    b.branch(more)
    b.position_at_end(more)
    turn.add_incoming(b.add(turn, I64(1)), more)
    b.branch(look)
    b.position_at_end(after)


def _drop(f: Function, pool: ffi.Pool, error: Value) -> None:
    """Destroys an error of XLA's, if there is one: whatever failed, the items still run."""
    there = f.b.icmp_unsigned("!=", error, ir.Constant(PTR, None))
    f.when(there, lambda: ffi.call_api(f, pool, "Error_Destroy", error=error))


def _external(module: ir.Module, name: str, returns: object, *args: object) -> ir.Function:
    if name in module.globals:
        return module.globals[name]
    return ir.Function(module, ir.FunctionType(returns, args), name)
