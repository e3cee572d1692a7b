"""What a page adds to the rows that attend to it: scores, the softmax so far, the weighted sum; see
`kernel`.

While one is computed memory brings what comes after it.
"""

from llvmlite import ir

from jblock.cpu_kernels import targets
from jblock.cpu_kernels.emit import F32, I32, I64, Function, Value
from jblock.cpu_kernels.paged_attention.form import BYTES, MASKED, Form


def block(module: ir.Module, form: Form) -> ir.Function:
    """Emits (k, v, next_k, next_v, k_scale, v_scale, q, acc, weights, best, total, position, from, visible):
    the `visible` tokens of a page, the first of which is at `from`, for `rows` rows of one KV head."""
    return _Block(module, form).emit()


class _Block:
    """The function under construction: its arguments by their names, and the three parts of its body.

    Attributes:
      vectors: of visible tokens.
      most_vectors: whose sums fit registers, for all rows.
    """

    def __init__(self, module: ir.Module, form: Form):
        self.form = form
        self.most_vectors = max(1, targets.accumulators() // form.rows)
        self.f = Function(module, "block", "ppppppppppppll")
        self.b = self.f.b
        self.k, self.v, self.next_k, self.next_v = self.f.args[:4]
        self.k_scale, self.v_scale, self.q, self.acc = self.f.args[4:8]
        self.weights, self.best, self.total, self.position = self.f.args[8:12]
        self.from_, self.visible = self.f.args[12:]
        self.vectors = self.f.up(self.visible, form.token_width)

    def emit(self) -> ir.Function:
        """All of it."""
        self._all_scores()
        keeps = [self._softmax(r) for r in range(self.form.rows)]
        columns = list(range(0, self.form.d, self.form.head_width))
        for at in range(0, len(columns), self.most_vectors):
            self._add_values(columns[at : at + self.most_vectors], keeps)
        self.f.end()
        return self.f.function

    def _all_scores(self) -> None:
        """Of the visible vectors of tokens, as many at a time as registers hold."""
        f, b, in_page = self.f, self.b, self.form.page // self.form.token_width
        most = count = min(self.most_vectors, in_page)
        done: Value = I64(0)
        while count:
            # One vector too many is masked and costs less than two passes over the page.
            spare = int(count > 2 and in_page % most == 0)
            rest = f.larger(b.sub(self.vectors, done), I64(0))
            more = b.udiv(b.add(rest, I64(spare)), I64(count))
            f.loop(
                more, lambda i, done=done, n=count: self._scores(b.add(done, b.mul(i, I64(n))), n)
            )
            done = b.add(done, b.mul(more, I64(count)))
            count //= 2

    def _scores(self, first: Value, count: int) -> None:
        """Of `count` vectors of tokens from vector `first` on."""
        f, b, form = self.f, self.b, self.form
        d, rows, page, tw = form.d, form.rows, form.page, form.token_width
        zero = [f.splat(0.0, tw)] * (rows * count)

        def along(i: Value, *sums: Value) -> list[Value]:
            at = b.add(b.mul(i, I64(page)), b.mul(first, I64(tw)))
            keys = [f.load(self.k, b.add(at, I64(tw * c)), tw, form.kv) for c in range(count)]
            _fetch(f, form, self.next_k, at, tw * count)
            out = list(sums)
            for r in range(rows):
                one = f.load_splat(self.q, b.add(i, I64(r * d)), tw)
                for c in range(count):
                    out[r * count + c] = f.fma(one, keys[c], out[r * count + c])
            return out

        sums = f.loop(d, along, zero)
        for c in range(count):
            token = b.mul(b.add(first, I64(c)), I64(tw))
            at_pos = f.splat(b.trunc(b.add(self.from_, token), I32), tw)
            pos = b.add(at_pos, f.iota(tw))
            for r in range(rows):
                x = self._masked(sums[r * count + c], r, token, pos)
                f.put(x, self.weights, b.add(token, I64(r * page)))

    def _masked(self, x: Value, r: int, token: Value, pos: Value) -> Value:
        """Row r's scores of a vector of tokens, from its products with their keys."""
        f, b, form, tw = self.f, self.b, self.form, self.form.token_width
        if form.kv == "int8":
            x = b.fmul(x, f.load(self.k_scale, token, tw))
        if form.softcap:
            cap = f.splat(form.softcap, tw)
            x = b.fmul(cap, f.tanh(b.fdiv(x, cap)))
        own = f.splat(b.load(f.at(self.position, r, 4), typ=I32), tw)
        seen = b.icmp_signed("<=", pos, own)
        if form.window:
            behind = b.sub(own, f.splat(I32(form.window), tw))
            seen = b.and_(seen, b.icmp_signed(">", pos, behind))
        return b.select(seen, x, f.splat(MASKED, tw))

    def _softmax(self, r: int) -> Value:
        """Row r's weights in the place of its scores, and its total; returns what its sum so far keeps."""
        f, b, tw, page = self.f, self.b, self.form.token_width, self.form.page
        maxnum = lambda x, y: f.math("maxnum", x, y)
        place = lambda i: b.add(b.mul(i, I64(tw)), I64(r * page))
        old = f.load_splat(self.best, r, tw)
        (top,) = f.loop(
            self.vectors,
            lambda i, m: [f.math("maxnum", m, f.load(self.weights, place(i), tw))],
            [old],
        )
        new = f.splat(f.fold(top, maxnum), tw)
        keep = f.exp(b.fsub(old, new))

        def soften(i: Value, sums: Value) -> list[Value]:
            x = f.load(self.weights, place(i), tw)
            # NaN is no less than anything.
            hidden = b.fcmp_ordered("<", x, f.splat(MASKED / 2, tw))
            w = b.select(hidden, f.splat(0.0, tw), f.exp(b.fsub(x, new)))
            stored = w
            if self.form.kv == "int8":
                stored = b.fmul(w, f.load(self.v_scale, b.mul(i, I64(tw)), tw))
                # A token nobody wrote may have any scale.
                stored = b.select(hidden, f.splat(0.0, tw), stored)
            f.put(stored, self.weights, place(i))
            return [b.fadd(sums, w)]

        (added,) = f.loop(self.vectors, soften, [f.splat(0.0, tw)])
        first = lambda x: b.extract_element(x, I32(0))
        kept = b.fmul(b.load(f.at(self.total, r, 4), typ=F32), first(keep))
        b.store(b.fadd(kept, f.fold(added, b.fadd)), f.at(self.total, r, 4))
        b.store(first(new), f.at(self.best, r, 4))
        return first(keep)

    def _add_values(self, part: list[int], keeps: list[Value]) -> None:
        """To the sums of all rows in vectors of columns that begin at those of `part`."""
        f, b, form = self.f, self.b, self.form
        d, rows, hw = form.d, form.rows, form.head_width
        before = [
            b.fmul(f.load(self.acc, r * d + x, hw), f.splat(keeps[r], hw))
            for r in range(rows)
            for x in part
        ]

        def along(t: Value, *sums: Value) -> list[Value]:
            row = b.mul(t, I64(d))
            values = [f.load(self.v, b.add(row, I64(x)), hw, form.kv) for x in part]
            _fetch(f, form, self.next_v, b.add(row, I64(part[0])), hw * len(part))
            out = list(sums)
            for r in range(rows):
                one = f.load_splat(self.weights, b.add(t, I64(r * form.page)), hw)
                for c, value in enumerate(values):
                    at = r * len(part) + c
                    out[at] = f.fma(one, value, out[at])
            return out

        for n, x in enumerate(f.loop(self.visible, along, before)):
            r, c = divmod(n, len(part))
            f.put(x, self.acc, r * d + part[c])


def _fetch(f: Function, form: Form, base: Value, index: Value, count: int) -> None:
    """Asks for `count` elements from `index` on of what comes after a page, while that is computed:
    without it memory waits meanwhile."""
    size = BYTES[form.kv]
    place = f.at(base, index, size)
    for at in range(0, count * size, 64):
        f.fetch(f.at(place, at))
