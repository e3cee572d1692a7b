"""What one item of paged attention does: a sequence's new tokens over a run of KV heads; see `kernel`."""

from typing import NamedTuple

from llvmlite import ir

from jblock.cpu_kernels.emit import F32, I32, I64, Function, Value, rounded
from jblock.cpu_kernels.paged_attention import block as page_block
from jblock.cpu_kernels.paged_attention.form import BYTES, MASKED, TILE_ROWS, Form

_POINTERS = (
    *("q", "k", "v", "row_starts", "q_lens", "kv_lens", "table"),
    *("k_pages", "v_pages", "k_scale", "v_scale", "out"),
)
SHARED = (
    *_POINTERS,
    *("kv_heads", "max_pages", "num_pages", "heads_of_item", "chunks", "rows", "rows_of_seq"),
    *("writes", "attends"),
)
"""Slots of what the items of a call share (int64 or pointer each)."""


def emit_item(module: ir.Module, form: Form) -> ir.Function:
    """(shared, i) -> nothing: item i of a call."""
    return _Item(module, form).emit()


def zero(f: Function, form: Form, pointer: Value, count: Value) -> None:
    """Zeroes float32 values, a multiple of head_width."""
    nothing, width = f.splat(0.0, form.head_width), I64(form.head_width)
    f.loop(f.b.udiv(count, width), lambda i: f.put(nothing, pointer, f.b.mul(i, width)))


class _State(NamedTuple):
    """What is kept of the rows that are computed, float32 but for `position`."""

    q: Value  # [rows, d]
    acc: Value  # [rows, d]
    weights: Value  # [form.rows, page], of the present block
    best: Value  # [rows]
    total: Value  # [rows]
    position: Value  # int32 [rows]


class _Tile(NamedTuple):
    """Some new tokens of the sequence, and the first of the heads that are computed together."""

    first: Value
    tokens: Value
    head: Value


class _Item:
    """The function under construction.

    Attributes:
      got: of SHARED, by name.
      s: the sequence.
      first_head, end_head: KV heads of the item.
      start, new: the sequence's first new position, and how many there are.
      row0: of the first new token.
      run: heads computed together.
      tile: tokens computed together.
      rows_of_head: rows of one head in the state, whole blocks.
      state_rows: of all heads.
    """

    def __init__(self, module: ir.Module, form: Form):
        self.form, self.tile = form, max(1, TILE_ROWS // form.groups)
        self.block = page_block.block(module, form)
        self.f = f = Function(module, "item", "pl")
        self.b = b = f.b
        shared, i = f.args
        self.got = {
            n: f.pointer(shared, 8 * at) if n in _POINTERS else f.int64(shared, at)
            for at, n in enumerate(SHARED)
        }
        got = self.got
        self.s = b.sdiv(i, got["chunks"])
        self.first_head = b.mul(b.srem(i, got["chunks"]), got["heads_of_item"])
        self.end_head = f.smaller(b.add(self.first_head, got["heads_of_item"]), got["kv_heads"])
        self.heads = b.mul(got["kv_heads"], I64(form.groups))

    def emit(self) -> ir.Function:
        """All of it."""
        f, b = self.f, self.b
        self._take_bounds()
        if self.form.grid:
            f.loop(self.got["rows_of_seq"], self._clear, first=self.new)
        writes = b.icmp_signed("!=", self.got["writes"], I64(0))
        f.loop(b.select(writes, self.new, I64(0)), self._write)
        self._make_state()

        def head_runs(n: Value) -> None:
            head = b.add(self.first_head, b.mul(n, self.run))
            f.loop(f.up(self.new, self.tile), lambda u: self._one_tile(u, head))

        attends = b.icmp_signed("!=", self.got["attends"], I64(0))
        there = b.and_(b.icmp_signed(">", self.new, I64(0)), attends)
        runs = b.select(there, b.sdiv(b.sub(self.end_head, self.first_head), self.run), I64(0))
        f.loop(runs, head_runs)
        f.end()
        return f.function

    def _take_bounds(self) -> None:
        """Lengths, rows and page ids are device data: wrong ones must not reach memory that is another's.
        A table bounds what a sequence can hold."""
        f, b, got, s = self.f, self.b, self.got, self.s
        page = I64(self.form.page)
        end = f.smaller(f.int32(got["kv_lens"], s), b.mul(got["max_pages"], page))
        new = f.smaller(f.int32(got["q_lens"], s), end)
        if self.form.grid:
            self.row0 = b.mul(s, got["rows_of_seq"])
            new = f.smaller(new, got["rows_of_seq"])
        else:
            self.row0 = f.larger(f.int32(got["row_starts"], s), I64(0))
            new = f.smaller(new, b.sub(got["rows"], self.row0))
        self.new = f.larger(new, I64(0))
        self.start = b.sub(end, self.new)
        self.entries = f.at(got["table"], b.mul(s, got["max_pages"]), 4)

    def _page_id(self, j: Value) -> Value:
        """Of a page to read; the null page for an id that there is none of."""
        f, b, got = self.f, self.b, self.got
        found = f.int32(self.entries, f.smaller(j, b.sub(got["max_pages"], I64(1))))
        there = b.icmp_unsigned("<", found, got["num_pages"])
        return b.select(there, found, I64(0))

    def _rows_of(self, base: Value, row: Value, head: Value, heads: Value) -> Value:
        """Of q, k, v or the output."""
        b = self.b
        return self.f.at(base, b.mul(b.add(b.mul(row, heads), head), I64(self.form.d)), 4)

    def _clear(self, t: Value) -> None:
        """Zeroes what the output has of row t of the sequence's grid, for the item's heads."""
        b, g = self.b, self.form.groups
        first = b.mul(self.first_head, I64(g))
        row = self._rows_of(self.got["out"], b.add(self.row0, t), first, self.heads)
        columns = b.mul(b.sub(self.end_head, self.first_head), I64(g * self.form.d))
        zero(self.f, self.form, row, columns)

    def _write(self, t: Value) -> None:
        """Puts new token t into its page, for the item's heads."""
        f, b, got, page = self.f, self.b, self.got, I64(self.form.page)
        position = b.add(self.start, t)
        to, offset = self._page_id(b.udiv(position, page)), b.urem(position, page)

        def head(h: Value) -> None:
            k, v = (
                self._rows_of(got[n], b.add(self.row0, t), h, got["kv_heads"]) for n in ("k", "v")
            )
            self._write_row(k, v, b.add(b.mul(to, got["kv_heads"]), h), offset)

        # The null page is never written.
        f.when(
            b.icmp_signed(">", to, I64(0)),
            lambda: f.loop(self.end_head, head, first=self.first_head) and None,
        )

    def _make_state(self) -> None:
        """Decoding visits all heads of a page before the next one, which reads it in one piece; more tokens
        make a tile, one head after the other."""
        f, b, form = self.f, self.b, self.form
        decoding = b.icmp_signed("==", self.new, I64(1))
        self.run = b.select(decoding, b.sub(self.end_head, self.first_head), I64(1))
        rows = b.mul(f.smaller(self.new, I64(self.tile)), I64(form.groups))
        self.rows_of_head = b.mul(f.up(rows, form.rows), I64(form.rows))
        self.state_rows = b.mul(self.run, self.rows_of_head)
        wide, narrow = (b.mul(self.state_rows, I64(4 * n)) for n in (form.d, 1))
        sizes = _State(
            q=wide,
            acc=wide,
            weights=I64(4 * form.rows * form.page),
            best=narrow,
            total=narrow,
            position=narrow,
        )
        # Aligned by hand to whole vectors.
        padded = [b.and_(b.add(x, I64(63)), I64(-64)) for x in sizes]
        begins: list[Value] = [I64(0)]
        for x in padded:
            begins.append(b.add(begins[-1], x))
        scratch = f.scratch(b.add(begins.pop(), I64(64)))
        self.state = _State(*(f.at(scratch, at) for at in begins))

    def _one_tile(self, u: Value, head: Value) -> None:
        """Tile u for a run of heads, over all pages that it sees."""
        f, b, form, page = self.f, self.b, self.form, self.form.page
        first = b.mul(u, I64(self.tile))
        tile = _Tile(first, f.smaller(b.sub(self.new, first), I64(self.tile)), head)
        first_pos = b.add(self.start, first)
        end_pos = b.add(first_pos, tile.tokens)
        zero(f, form, self.state.acc, b.mul(self.state_rows, I64(form.d)))
        f.loop(self.state_rows, lambda r: self._begin(tile, r))
        first_page: Value = I64(0)
        if form.window:
            oldest = b.sub(first_pos, I64(form.window - 1))
            first_page = b.udiv(f.larger(oldest, I64(0)), I64(page))
        f.loop(f.up(end_pos, page), lambda j: self._visit(tile, end_pos, j), first=first_page)
        f.loop(self.state_rows, lambda r: self._finish(tile, r))

    def _row(self, tile: _Tile, r: Value) -> tuple[Value, Value]:
        """Token of a tile and query head of row r of the state."""
        b, g = self.b, I64(self.form.groups)
        inner = b.urem(r, self.rows_of_head)
        head = b.mul(b.add(tile.head, b.udiv(r, self.rows_of_head)), g)
        return b.udiv(inner, g), b.add(head, b.urem(inner, g))

    def _begin(self, tile: _Tile, r: Value) -> None:
        """Row r's query, scaled, and nothing seen so far."""
        f, b, d, width = self.f, self.b, self.form.d, self.form.head_width
        token, head = self._row(tile, r)
        # Rows beyond the last token repeat it; nobody reads them.
        token = f.smaller(token, b.sub(tile.tokens, I64(1)))
        row = b.add(b.add(self.row0, tile.first), token)
        source = self._rows_of(self.got["q"], row, head, self.heads)
        to = f.at(self.state.q, b.mul(r, I64(d)), 4)
        factor = f.splat(self.form.scale, width)
        for x in range(0, d, width):
            f.put(b.fmul(f.load(source, x, width), factor), to, x)
        b.store(F32(rounded(MASKED)), f.at(self.state.best, r, 4))
        b.store(F32(0.0), f.at(self.state.total, r, 4))
        position = b.trunc(b.add(b.add(self.start, tile.first), token), I32)
        b.store(position, f.at(self.state.position, r, 4))

    def _visit(self, tile: _Tile, end_pos: Value, j: Value) -> None:
        """Logical page j, for all rows of the tile."""
        f, b, form, page = self.f, self.b, self.form, self.form.page
        kv_heads = self.got["kv_heads"]
        from_ = b.mul(j, I64(page))
        visible = f.smaller(b.sub(end_pos, from_), I64(page))
        here, following = (
            b.add(b.mul(self._page_id(n), kv_heads), tile.head) for n in (j, b.add(j, I64(1)))
        )

        def head(h: Value) -> None:
            cell = b.add(here, h)
            more = b.icmp_signed("<", b.add(h, I64(1)), self.run)
            then = b.select(more, b.add(cell, I64(1)), following)
            size = page * form.d * BYTES[form.kv]
            pages = [
                f.at(self.got[n], c, size) for c in (cell, then) for n in ("k_pages", "v_pages")
            ]
            scales = [f.at(self.got[n], cell, 4 * page) for n in ("k_scale", "v_scale")]

            def rows(block: Value) -> None:
                r = b.add(b.mul(h, self.rows_of_head), b.mul(block, I64(form.rows)))
                state = self.state
                wide = [f.at(place, b.mul(r, I64(form.d)), 4) for place in (state.q, state.acc)]
                narrow = [f.at(x, r, 4) for x in (state.best, state.total, state.position)]
                f.call(self.block, *pages, *scales, *wide, state.weights, *narrow, from_, visible)

            f.loop(b.udiv(self.rows_of_head, I64(form.rows)), rows)

        f.loop(self.run, head)

    def _finish(self, tile: _Tile, r: Value) -> None:
        """Row r's result, if it is a token's."""
        f, b, d, width = self.f, self.b, self.form.d, self.form.head_width
        token, head = self._row(tile, r)

        def store() -> None:
            row = b.add(b.add(self.row0, tile.first), token)
            to = self._rows_of(self.got["out"], row, head, self.heads)
            source = f.at(self.state.acc, b.mul(r, I64(d)), 4)
            total = f.load_splat(self.state.total, r, width)
            empty = b.fcmp_ordered("==", total, f.splat(0.0, width))
            total = b.select(empty, f.splat(1.0, width), total)
            for x in range(0, d, width):
                f.put(b.fdiv(f.load(source, x, width), total), to, x)

        f.when(b.icmp_signed("<", token, tile.tokens), store)

    def _write_row(self, k: Value, v: Value, cell: Value, offset: Value) -> None:
        """Puts one token's key and value (pointers to d float32) of one head into its page."""
        f, b, got, form, width = self.f, self.b, self.got, self.form, self.form.head_width
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
