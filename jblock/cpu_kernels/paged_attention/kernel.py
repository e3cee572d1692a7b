"""Paged attention in machine code for the CPU: what is emitted for one form of it.

Pages are read where they lie, once for all heads that share a KV head, with an online softmax (arXiv
2205.14135) a page at a time. K is `[page, kv_head, d, token]`, so scores of neighboring tokens are one
vector; V is `[page, kv_head, token, d]`. A call's items are (sequence, run of KV heads): an item first
writes its sequence's new keys and values for its heads, then attends, so items depend on nothing but
their own pages, and a row's bits on nothing but its own sequence. Where neighbors in a grid are tokens of
one sequence, all items write before the first attends.
"""

from collections.abc import Sequence

from llvmlite import ir

from jblock.cpu_kernels import ffi, threads
from jblock.cpu_kernels.emit import I64, Function, Value
from jblock.cpu_kernels.paged_attention.form import BYTES, Form
from jblock.cpu_kernels.paged_attention.item import SHARED, emit_item, zero


def emit(module: ir.Module, name: str, fields: Sequence[str]) -> None:
    """Adds the target `name`. Its arguments are q, k, v (float32), row_starts, q_lens, kv_lens,
    page_table and the page arrays; its results the output and the page arrays, in place."""
    form = Form.parse(fields)
    scaled = form.kv == "int8"
    count = 4 if scaled else 2
    item = emit_item(module, form)

    def body(f: Function, args: Sequence[ffi.Buffer], results: Sequence[ffi.Buffer], pool) -> None:
        b = f.b
        q, k, v, row_starts, q_lens, kv_lens, table = args[:7]
        out, pages = results[0], results[1:]
        shared = f.scratch(8 * len(SHARED))
        seqs, max_pages = f.int64(table.dims, 0), f.int64(table.dims, 1)
        kv_heads = f.int64(k.dims, 1)
        threads_there = threads.num_threads(f, pool)

        # What there is to do: bytes of KV, and operations at about 8 in the time of a byte.
        size = BYTES[form.kv]

        def add(s: Value, work: Value, used: Value):
            new, total = f.int32(q_lens.data, s), f.int32(kv_lens.data, s)
            per_token = b.add(I64(2 * size), b.mul(new, I64(form.groups // 2 + 1)))
            work = b.add(work, b.mul(b.mul(total, per_token), b.mul(kv_heads, I64(form.d))))
            return work, b.add(used, b.zext(b.icmp_signed(">", new, I64(0)), I64))

        work, used = f.loop(seqs, add, (I64(0), I64(0)))
        helpers = f.smaller(b.sub(threads_there, I64(1)), b.sdiv(work, I64(_HELPER_WORK)))
        # Whole pages are read in one go where there are sequences enough for all threads.
        many = b.icmp_signed(">=", used, b.mul(threads_there, I64(2)))
        alone = b.icmp_signed("<=", helpers, I64(0))
        heads_of_item = b.select(b.or_(many, alone), kv_heads, I64(1))
        chunks = b.sdiv(b.add(kv_heads, b.sub(heads_of_item, I64(1))), heads_of_item)
        values = {
            "q": q.data, "k": k.data, "v": v.data, "row_starts": row_starts.data,
            "q_lens": q_lens.data, "kv_lens": kv_lens.data, "table": table.data,
            "k_pages": pages[0].data, "v_pages": pages[1].data,
            "k_scale": pages[2].data if scaled else pages[0].data,
            "v_scale": pages[3].data if scaled else pages[0].data,
            "out": out.data, "kv_heads": kv_heads, "max_pages": max_pages,
            "num_pages": f.int64(pages[0].dims, 0), "heads_of_item": heads_of_item,
            "chunks": chunks, "rows": f.int64(q.dims, 0),
            "rows_of_seq": b.sdiv(f.int64(q.dims, 0), seqs),
            "writes": I64(1), "attends": I64(1),
        }  # fmt: skip
        for at, slot in enumerate(SHARED):
            f.store(values[slot], shared, 8 * at)
        if not form.grid:  # Rows in no run belong to no item.
            rows = b.mul(f.int64(q.dims, 0), b.mul(kv_heads, I64(form.groups)))
            zero(f, form, out.data, b.mul(rows, I64(form.d)))

        def run() -> None:
            threads.parallel_for(f, pool, b.mul(seqs, chunks), helpers, item, shared)

        if not form.grid:
            run()
        else:
            writes, attends = (8 * SHARED.index(n) for n in ("writes", "attends"))
            joined = _are_joined(f, form, q_lens.data, kv_lens.data, table.data, seqs, max_pages)
            with b.if_else(b.icmp_signed(">", joined, I64(0))) as (apart, at_once):
                with apart:
                    f.store(I64(0), shared, attends)
                    run()
                    f.store(I64(0), shared, writes)
                    f.store(I64(1), shared, attends)
                    run()
                with at_once:
                    run()

    ffi.handler(module, name, 7 + count, 1 + count, body)


def _are_joined(
    f: Function,
    form: Form,
    q_lens: Value,
    kv_lens: Value,
    table: Value,
    seqs: Value,
    max_pages: Value,
) -> Value:
    """int64, over 0 if a sequence of the grid writes to a page that the one behind it reads: they are tokens
    of one sequence, for nothing else may hold a page that is written."""
    b = f.b
    last = b.sub(max_pages, I64(1))

    def look(s: Value, found: Value) -> list[Value]:
        behind = b.add(s, I64(1))
        first = b.sub(f.int32(kv_lens, s), f.int32(q_lens, s))
        column = f.smaller(f.larger(b.sdiv(first, I64(form.page)), I64(0)), last)
        own, other = (f.int32(table, b.add(b.mul(n, max_pages), column)) for n in (s, behind))
        both = b.and_(
            b.icmp_signed(">", f.int32(q_lens, s), I64(0)),
            b.icmp_signed(">", f.int32(q_lens, behind), I64(0)),
        )
        same = b.and_(b.icmp_signed("==", own, other), b.icmp_signed(">", own, I64(0)))
        return [b.add(found, b.zext(b.and_(both, same), I64))]

    return f.loop(b.sub(seqs, I64(1)), look, (I64(0),))[0]


_HELPER_WORK = 300_000  # Bytes to read that make up for waking a thread, which takes some 10 us.
