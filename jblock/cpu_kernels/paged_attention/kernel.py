"""Paged attention in machine code for the CPU: what is emitted for one form of it.

Pages are read where they lie, once for all heads that share a KV head, with an online softmax (arXiv
2205.14135) a page at a time. K is `[page, kv_head, d, token]`, so scores of neighboring tokens are one
vector; V is `[page, kv_head, token, d]`. A call's items are (sequence, run of KV heads): an item first
writes its sequence's new keys and values for its heads, then attends, so items depend on nothing but
their own pages, and a row's bits on nothing but its own sequence.
"""

from collections.abc import Sequence

from llvmlite import ir

from jblock.cpu_kernels import ffi, threads
from jblock.cpu_kernels.emit import F32, I32, I64, Function, Value, rounded
from jblock.cpu_kernels.paged_attention import block as page_block
from jblock.cpu_kernels.paged_attention.form import BYTES, MASKED, TILE_ROWS, Form

# Slots of what the items of a call share (int64 or pointer each).
_SHARED = (
    *("q", "k", "v", "row_starts", "q_lens", "kv_lens", "table"),
    *("k_pages", "v_pages", "k_scale", "v_scale", "out"),
    *("kv_heads", "max_pages", "num_pages", "heads_of_item", "chunks", "rows", "rows_of_seq"),
)


def emit(module: ir.Module, name: str, fields: Sequence[str]) -> None:
    """Adds the target `name`. Its arguments are q, k, v (float32), row_starts, q_lens, kv_lens,
    page_table and the page arrays; its results the output and the page arrays, in place."""
    form = Form.parse(fields)
    scaled = form.kv == "int8"
    count = 4 if scaled else 2
    kernel = _Kernel(module, form)

    def body(f: Function, args: Sequence[ffi.Buffer], results: Sequence[ffi.Buffer], pool) -> None:
        b = f.b
        q, k, v, row_starts, q_lens, kv_lens, table = args[:7]
        out, pages = results[0], results[1:]
        shared = f.scratch(8 * len(_SHARED))
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
        }  # fmt: skip
        for at, slot in enumerate(_SHARED):
            f.store(values[slot], shared, 8 * at)
        if not form.grid:  # Rows in no run belong to no item.
            rows = b.mul(f.int64(q.dims, 0), b.mul(kv_heads, I64(form.groups)))
            kernel.zero(f, out.data, b.mul(rows, I64(form.d)))
        threads.parallel_for(f, pool, b.mul(seqs, chunks), helpers, kernel.item, shared)

    ffi.handler(module, name, 7 + count, 1 + count, body)


_HELPER_WORK = 300_000  # Bytes to read that make up for waking a thread, which takes some 10 us.


class _Kernel:
    """The functions of one form.

    Attributes:
      item: (shared, i) -> nothing: item i of a call.
    """

    def __init__(self, module: ir.Module, form: Form):
        self.module, self.form = module, form
        self.block = page_block.block(module, form)
        self.item = self._item()

    def zero(self, f: Function, pointer: Value, count: Value) -> None:
        """Zeroes float32 values, a multiple of head_width."""
        zero = f.splat(0.0, self.form.head_width)
        steps = f.b.udiv(count, I64(self.form.head_width))
        f.loop(steps, lambda i: f.put(zero, pointer, f.b.mul(i, I64(self.form.head_width))))

    def _item(self) -> ir.Function:
        form, g, d, page = self.form, self.form.groups, self.form.d, self.form.page
        f = Function(self.module, "item", "pl")
        b, (shared, i) = f.b, f.args
        got = {
            n: (
                f.pointer(shared, 8 * at) if at < _SHARED.index("kv_heads") else f.int64(shared, at)
            )
            for at, n in enumerate(_SHARED)
        }
        kv_heads, chunks = got["kv_heads"], got["chunks"]
        s = b.sdiv(i, chunks)
        first_head = b.mul(b.srem(i, chunks), got["heads_of_item"])
        end_head = f.smaller(b.add(first_head, got["heads_of_item"]), kv_heads)
        # Lengths, rows and page ids are device data: wrong ones must not reach memory that is another's.
        # A table bounds what a sequence can hold.
        end = f.smaller(f.int32(got["kv_lens"], s), b.mul(got["max_pages"], I64(page)))
        new = f.smaller(f.int32(got["q_lens"], s), end)
        if form.grid:
            row0 = b.mul(s, got["rows_of_seq"])
            new = f.smaller(new, got["rows_of_seq"])
        else:
            row0 = f.larger(f.int32(got["row_starts"], s), I64(0))
            new = f.smaller(new, b.sub(got["rows"], row0))
        new = f.larger(new, I64(0))
        start = b.sub(end, new)
        entries = f.at(got["table"], b.mul(s, got["max_pages"]), 4)

        def page_id(j: Value) -> Value:
            """Of a page to read; the null page for an id that there is none of."""
            found = f.int32(entries, f.smaller(j, b.sub(got["max_pages"], I64(1))))
            there = b.icmp_unsigned("<", found, got["num_pages"])
            return b.select(there, found, I64(0))

        def rows_of(base: Value, row: Value, head: Value, heads: Value) -> Value:
            """Of q, k, v or the output."""
            return f.at(base, b.mul(b.add(b.mul(row, heads), head), I64(d)), 4)

        heads = b.mul(kv_heads, I64(g))
        if form.grid:

            def clear(t: Value) -> None:
                row = rows_of(got["out"], b.add(row0, t), b.mul(first_head, I64(g)), heads)
                self.zero(f, row, b.mul(b.sub(end_head, first_head), I64(g * d)))

            f.loop(got["rows_of_seq"], clear, first=new)

        def write(t: Value) -> None:
            position = b.add(start, t)
            to = page_id(b.udiv(position, I64(page)))
            offset = b.urem(position, I64(page))

            def head(h: Value) -> None:
                k, v = (rows_of(got[n], b.add(row0, t), h, kv_heads) for n in ("k", "v"))
                cell = b.add(b.mul(to, kv_heads), h)
                self._write_row(f, got, k, v, cell, offset)

            # The null page is never written.
            f.when(
                b.icmp_signed(">", to, I64(0)),
                lambda: f.loop(end_head, head, first=first_head) and None,
            )

        f.loop(new, write)

        # Decoding visits all heads of a page before the next one, which reads it in one piece; more
        # tokens make a tile, one head after the other.
        decoding = b.icmp_signed("==", new, I64(1))
        run = b.select(decoding, b.sub(end_head, first_head), I64(1))
        tile = max(1, TILE_ROWS // g)
        rows_of_head = b.mul(
            f.up(b.mul(f.smaller(new, I64(tile)), I64(g)), form.rows), I64(form.rows)
        )
        state_rows = b.mul(run, rows_of_head)
        # Aligned by hand to whole vectors: q, acc, weights of a block, best, total, position.
        sizes = (
            b.mul(state_rows, I64(4 * d)), b.mul(state_rows, I64(4 * d)),
            I64(4 * form.rows * page), *[b.mul(state_rows, I64(4))] * 3,
        )  # fmt: skip
        padded = [b.and_(b.add(x, I64(63)), I64(-64)) for x in sizes]
        total_bytes = I64(64)
        for x in padded:
            total_bytes = b.add(total_bytes, x)
        scratch = f.scratch(total_bytes)
        state = {}
        at: Value = I64(0)
        for name, x in zip(
            ("q", "acc", "weights", "best", "total", "position"), padded, strict=True
        ):
            state[name] = f.at(scratch, at)
            at = b.add(at, x)

        def one_tile(u: Value, h0: Value) -> None:
            token0 = b.mul(u, I64(tile))
            tokens = f.smaller(b.sub(new, token0), I64(tile))
            first_pos = b.add(start, token0)
            last_pos = b.sub(b.add(first_pos, tokens), I64(1))
            self.zero(f, state["acc"], b.mul(state_rows, I64(d)))

            def begin(r: Value) -> None:
                # Rows beyond the last token repeat it; nobody reads them.
                inner = b.urem(r, rows_of_head)
                token = f.smaller(b.udiv(inner, I64(g)), b.sub(tokens, I64(1)))
                head = b.add(
                    b.mul(b.add(h0, b.udiv(r, rows_of_head)), I64(g)), b.urem(inner, I64(g))
                )
                source = rows_of(got["q"], b.add(b.add(row0, token0), token), head, heads)
                to = f.at(state["q"], b.mul(r, I64(d)), 4)
                factor = f.splat(form.scale, self.form.head_width)
                for x in range(0, d, self.form.head_width):
                    f.put(b.fmul(f.load(source, x, self.form.head_width), factor), to, x)
                f.b.store(F32(rounded(MASKED)), f.at(state["best"], r, 4))
                f.b.store(F32(0.0), f.at(state["total"], r, 4))
                position = b.trunc(b.add(first_pos, token), I32)
                f.b.store(position, f.at(state["position"], r, 4))

            f.loop(state_rows, begin)
            first_page: Value = I64(0)
            if form.window:
                oldest = b.sub(first_pos, I64(form.window - 1))
                first_page = b.udiv(f.larger(oldest, I64(0)), I64(page))

            def visit(j: Value) -> None:
                from_ = b.mul(j, I64(page))
                visible = f.smaller(b.sub(b.add(last_pos, I64(1)), from_), I64(page))
                cell0 = b.add(b.mul(page_id(j), kv_heads), h0)

                following = b.add(b.mul(page_id(b.add(j, I64(1))), kv_heads), h0)

                def head(h: Value) -> None:
                    cell = b.add(cell0, h)
                    more = b.icmp_signed("<", b.add(h, I64(1)), run)
                    then = b.select(more, b.add(cell, I64(1)), following)
                    size = page * d * BYTES[form.kv]
                    pages = [
                        f.at(got[n], c, size) for c in (cell, then) for n in ("k_pages", "v_pages")
                    ]
                    scales = [f.at(got[n], cell, 4 * page) for n in ("k_scale", "v_scale")]

                    def rows(block: Value) -> None:
                        r = b.add(b.mul(h, rows_of_head), b.mul(block, I64(form.rows)))
                        f.call(
                            self.block, *pages, *scales,
                            f.at(state["q"], b.mul(r, I64(d)), 4),
                            f.at(state["acc"], b.mul(r, I64(d)), 4),
                            state["weights"],
                            *(f.at(state[n], r, 4) for n in ("best", "total", "position")),
                            from_, visible,
                        )  # fmt: skip

                    f.loop(b.udiv(rows_of_head, I64(form.rows)), rows)

                f.loop(run, head)

            f.loop(f.up(b.add(last_pos, I64(1)), page), visit, first=first_page)

            def finish(r: Value) -> None:
                inner = b.urem(r, rows_of_head)
                token = b.udiv(inner, I64(g))

                def store() -> None:
                    head = b.add(
                        b.mul(b.add(h0, b.udiv(r, rows_of_head)), I64(g)), b.urem(inner, I64(g))
                    )
                    to = rows_of(got["out"], b.add(b.add(row0, token0), token), head, heads)
                    source = f.at(state["acc"], b.mul(r, I64(d)), 4)
                    total = f.load_splat(state["total"], r, self.form.head_width)
                    empty = b.fcmp_ordered("==", total, f.splat(0.0, self.form.head_width))
                    total = b.select(empty, f.splat(1.0, self.form.head_width), total)
                    for x in range(0, d, self.form.head_width):
                        f.put(b.fdiv(f.load(source, x, self.form.head_width), total), to, x)

                f.when(b.icmp_signed("<", token, tokens), store)

            f.loop(state_rows, finish)

        def head_runs(n: Value) -> None:
            h0 = b.add(first_head, b.mul(n, run))
            f.loop(f.up(new, tile), lambda u: one_tile(u, h0))

        there = b.icmp_signed(">", new, I64(0))
        runs = b.select(there, b.sdiv(b.sub(end_head, first_head), run), I64(0))
        f.loop(runs, head_runs)
        f.end()
        return f.function

    def _write_row(
        self, f: Function, got: dict[str, Value], k: Value, v: Value, cell: Value, offset: Value
    ) -> None:
        """Puts one token's key and value (pointers to d float32) of one head into its page."""
        form, b, width = self.form, f.b, self.form.head_width
        size = BYTES[form.kv]
        steps = range(0, form.d, width)
        k_page = f.at(got["k_pages"], cell, form.page * form.d * size)
        v_page = f.at(got["v_pages"], cell, form.page * form.d * size)
        for source, scales, to in ((k, "k_scale", k_page), (v, "v_scale", v_page)):
            values = [f.load(source, x, width) for x in steps]
            if form.kv == "int8":  # as in quantize.py
                most = f.splat(0.0, width)
                for x in values:
                    most = f.math("maxnum", most, f.math("fabs", x))
                largest = f.fold(most, lambda x, y: f.math("maxnum", x, y))
                scale = b.fdiv(largest, F32(127.0))
                b.store(scale, f.at(got[scales], b.add(b.mul(cell, I64(form.page)), offset), 4))
                divisor = b.select(b.fcmp_ordered(">", scale, F32(0.0)), scale, F32(1.0))
                limit = f.splat(127.0, width)
                values = [
                    f.math(
                        "maxnum",
                        f.math("minnum", b.fdiv(x, f.splat(divisor, width)), limit),
                        b.fneg(limit),
                    )
                    for x in values
                ]
            for x, value in zip(steps, values, strict=True):
                if to is v_page:
                    f.put(value, to, b.add(b.mul(offset, I64(form.d)), I64(x)), form.kv)
                    continue
                narrow = f.narrow(value, form.kv)
                for e in range(width):
                    cell_at = b.add(offset, I64((x + e) * form.page))
                    b.store(b.extract_element(narrow, I32(e)), f.at(to, cell_at, size))
