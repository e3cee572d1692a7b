"""Paged attention in machine code for the CPU: what is emitted for one form of it.

Pages are read where they lie, once for all heads that share a KV head, with an online softmax (arXiv
2205.14135) a page at a time. K is `[page, kv_head, d, token]`, so scores of neighbouring tokens are one
vector; V is `[page, kv_head, token, d]`. A call's items are (sequence, run of KV heads): an item first
writes its sequence's new keys and values for its heads, then attends, so items depend on nothing but
their own pages, and a row's bits on nothing but its own sequence.
"""

import dataclasses
import math
import struct
from collections.abc import Sequence

from llvmlite import ir

from jblock.pallas_kernels.native import ffi, targets, threads
from jblock.pallas_kernels.native.emit import F32, I32, I64, Function, Value, rounded

TILE_ROWS = 64
"""Rows (tokens x heads of a KV head) that pass over the pages together."""

_MASKED = -1e30
_DTYPES = {"float32": 4, "bfloat16": 2, "int8": 1}

# Slots of what the items of a call share (int64 or pointer each).
_SHARED = (
    *("q", "k", "v", "row_starts", "q_lens", "kv_lens", "table"),
    *("k_pages", "v_pages", "k_scale", "v_scale", "out"),
    *("kv_heads", "max_pages", "num_pages", "heads_of_item", "chunks", "rows_of_seq"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """All that the machine code depends on.

    Attributes:
      kv: dtype of the pages, one of float32, bfloat16, int8.
      d: width of a head, a multiple of 4.
      groups: query heads of a KV head.
      page: tokens of a page, a multiple of 4.
      grid: whether rows are the engine's grid, so many for every sequence.
      rows: of queries that are multiplied with a K or V vector while it is in a register.
      window: tokens visible to a query; 0 all.
      softcap: of the scores; 0 none.
      scale: of the scores.
    """

    kv: str
    d: int
    groups: int
    page: int
    grid: bool
    rows: int
    window: int
    softcap: float
    scale: float

    @property
    def fields(self) -> tuple[str, ...]:
        """As they stand in a target's name."""
        floats = (struct.pack(">f", x).hex() for x in (self.softcap, self.scale))
        ints = (self.d, self.groups, self.page, int(self.grid), self.rows, self.window)
        return (self.kv, *map(str, ints), *floats)

    @classmethod
    def parse(cls, fields: Sequence[str]) -> "Form":
        """The inverse of `fields`."""
        kv, d, groups, page, grid, rows, window, softcap, scale = fields
        unpack = lambda x: struct.unpack(">f", bytes.fromhex(x))[0]
        return cls(
            kv=kv,
            d=int(d),
            groups=int(groups),
            page=int(page),
            grid=bool(int(grid)),
            rows=int(rows),
            window=int(window),
            softcap=unpack(softcap),
            scale=unpack(scale),
        )


def rows_at_once(groups: int, max_q_len: int) -> int:
    """Form.rows for sequences of up to max_q_len new tokens: at most 6, which leaves registers for four
    vectors of K or V each, and no more idle ones than needed."""
    rows = min(max_q_len * groups, TILE_ROWS)
    most = 6 if targets.accumulators() >= 24 else 3
    return -(-rows // -(-rows // most))


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
        size = _DTYPES[form.kv]

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
            "chunks": chunks, "rows_of_seq": b.sdiv(f.int64(q.dims, 0), seqs),
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
        width = targets.vector_width()
        self.token_width = math.gcd(form.page, width)
        self.head_width = math.gcd(form.d, width)
        self.vectors = max(1, targets.accumulators() // form.rows)
        self.block = self._block()
        self.item = self._item()

    def zero(self, f: Function, pointer: Value, count: Value) -> None:
        """Zeroes float32 values, a multiple of head_width."""
        zero = f.splat(0.0, self.head_width)
        steps = f.b.udiv(count, I64(self.head_width))
        f.loop(steps, lambda i: f.put(zero, pointer, f.b.mul(i, I64(self.head_width))))

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
        row0 = f.int32(got["row_starts"], s)
        new = f.larger(f.int32(got["q_lens"], s), I64(0))
        if form.grid:
            new = f.smaller(new, got["rows_of_seq"])
        # A table bounds what a sequence can hold.
        end = f.smaller(f.int32(got["kv_lens"], s), b.mul(got["max_pages"], I64(page)))
        start = f.larger(b.sub(end, new), I64(0))
        entries = f.at(got["table"], b.mul(s, got["max_pages"]), 4)

        def page_id(j: Value) -> Value:
            found = f.larger(
                f.int32(entries, f.smaller(j, b.sub(got["max_pages"], I64(1)))), I64(0)
            )
            return f.smaller(found, b.sub(got["num_pages"], I64(1)))

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
                factor = f.splat(form.scale, self.head_width)
                for x in range(0, d, self.head_width):
                    f.put(b.fmul(f.load(source, x, self.head_width), factor), to, x)
                f.b.store(F32(rounded(_MASKED)), f.at(state["best"], r, 4))
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
                    size = page * d * _DTYPES[form.kv]
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
                    total = f.load_splat(state["total"], r, self.head_width)
                    empty = b.fcmp_ordered("==", total, f.splat(0.0, self.head_width))
                    total = b.select(empty, f.splat(1.0, self.head_width), total)
                    for x in range(0, d, self.head_width):
                        f.put(b.fdiv(f.load(source, x, self.head_width), total), to, x)

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
        form, b, width = self.form, f.b, self.head_width
        size = _DTYPES[form.kv]
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

    def _block(self) -> ir.Function:
        """A page's visible tokens for `rows` rows of one KV head: scores, softmax so far, weighted sum."""
        form, d, rows, page = self.form, self.form.d, self.form.rows, self.form.page
        tw, hw = self.token_width, self.head_width
        f = Function(self.module, "block", "ppppppppppppll")
        b = f.b
        k, v, next_k, next_v, k_scale, v_scale, q, acc, weights = f.args[:9]
        best, total, position, from_, visible = f.args[9:]
        vectors = f.up(visible, tw)

        def scores(first: Value, count: int) -> None:
            """Of `count` vectors of tokens from vector `first` on."""
            zero = [f.splat(0.0, tw)] * (rows * count)

            def along(i: Value, *sums: Value) -> list[Value]:
                at = b.add(b.mul(i, I64(page)), b.mul(first, I64(tw)))
                keys = [f.load(k, b.add(at, I64(tw * c)), tw, form.kv) for c in range(count)]
                self._fetch(f, next_k, at, tw * count)
                out = list(sums)
                for r in range(rows):
                    one = f.load_splat(q, b.add(i, I64(r * d)), tw)
                    for c in range(count):
                        out[r * count + c] = f.fma(one, keys[c], out[r * count + c])
                return out

            sums = f.loop(d, along, zero)
            for c in range(count):
                token = b.mul(b.add(first, I64(c)), I64(tw))
                at_pos = f.splat(b.trunc(b.add(from_, token), I32), tw)
                pos = b.add(at_pos, f.iota(tw))
                for r in range(rows):
                    x = sums[r * count + c]
                    if form.kv == "int8":
                        x = b.fmul(x, f.load(k_scale, token, tw))
                    if form.softcap:
                        cap = f.splat(form.softcap, tw)
                        x = b.fmul(cap, f.tanh(b.fdiv(x, cap)))
                    own = f.splat(b.load(f.at(position, r, 4), typ=I32), tw)
                    seen = b.icmp_signed("<=", pos, own)
                    if form.window:
                        behind = b.sub(own, f.splat(I32(form.window), tw))
                        seen = b.and_(seen, b.icmp_signed(">", pos, behind))
                    x = b.select(seen, x, f.splat(_MASKED, tw))
                    f.put(x, weights, b.add(token, I64(r * page)))

        most = count = min(self.vectors, page // tw)
        done: Value = I64(0)
        while count:
            # One vector too many is masked and costs less than two passes over the page.
            spare = int(count > 2 and page // tw % most == 0)
            rest = f.larger(b.sub(vectors, done), I64(0))
            more = b.udiv(b.add(rest, I64(spare)), I64(count))
            f.loop(more, lambda i, done=done, n=count: scores(b.add(done, b.mul(i, I64(n))), n))
            done = b.add(done, b.mul(more, I64(count)))
            count //= 2

        maxnum = lambda x, y: f.math("maxnum", x, y)
        keeps = []
        for r in range(rows):
            place = lambda i, r=r: b.add(b.mul(i, I64(tw)), I64(r * page))
            old = f.load_splat(best, r, tw)
            (top,) = f.loop(
                vectors,
                lambda i, m, place=place: [f.math("maxnum", m, f.load(weights, place(i), tw))],
                [old],
            )
            new = f.splat(f.fold(top, maxnum), tw)
            keep = f.exp(b.fsub(old, new))

            def soften(i: Value, sums: Value, place=place, new=new) -> list[Value]:
                x = f.load(weights, place(i), tw)
                # NaN is no less than anything.
                hidden = b.fcmp_ordered("<", x, f.splat(_MASKED / 2, tw))
                w = b.select(hidden, f.splat(0.0, tw), f.exp(b.fsub(x, new)))
                stored = w
                if form.kv == "int8":
                    stored = b.fmul(w, f.load(v_scale, b.mul(i, I64(tw)), tw))
                    # A token nobody wrote may have any scale.
                    stored = b.select(hidden, f.splat(0.0, tw), stored)
                f.put(stored, weights, place(i))
                return [b.fadd(sums, w)]

            (added,) = f.loop(vectors, soften, [f.splat(0.0, tw)])
            first = lambda x: b.extract_element(x, I32(0))
            kept = b.fmul(b.load(f.at(total, r, 4), typ=F32), first(keep))
            b.store(b.fadd(kept, f.fold(added, b.fadd)), f.at(total, r, 4))
            b.store(first(new), f.at(best, r, 4))
            keeps.append(first(keep))

        columns = list(range(0, d, hw))
        for at in range(0, len(columns), self.vectors):
            part = columns[at : at + self.vectors]
            sums = [
                b.fmul(f.load(acc, r * d + x, hw), f.splat(keeps[r], hw))
                for r in range(rows)
                for x in part
            ]

            def along(t: Value, *sums: Value, part=part) -> list[Value]:
                row = b.mul(t, I64(d))
                values = [f.load(v, b.add(row, I64(x)), hw, form.kv) for x in part]
                self._fetch(f, next_v, b.add(row, I64(part[0])), hw * len(part))
                out = list(sums)
                for r in range(rows):
                    one = f.load_splat(weights, b.add(t, I64(r * page)), hw)
                    for c, value in enumerate(values):
                        at = r * len(part) + c
                        out[at] = f.fma(one, value, out[at])
                return out

            sums = f.loop(visible, along, sums)
            for n, x in enumerate(sums):
                r, c = divmod(n, len(part))
                f.put(x, acc, r * d + part[c])
        f.end()
        return f.function

    def _fetch(self, f: Function, base: Value, index: Value, count: int) -> None:
        """Asks for `count` elements from `index` on of what comes after a page, while that is computed:
        without it memory waits meanwhile."""
        size = _DTYPES[self.form.kv]
        place = f.at(base, index, size)
        for at in range(0, count * size, 64):
            f.fetch(f.at(place, at))
