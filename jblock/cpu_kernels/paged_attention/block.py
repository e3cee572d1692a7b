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
    d, rows, page = form.d, form.rows, form.page
    tw, hw = form.token_width, form.head_width
    most_vectors = max(1, targets.accumulators() // rows)
    f = Function(module, "block", "ppppppppppppll")
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
            _fetch(f, form, next_k, at, tw * count)
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
                x = b.select(seen, x, f.splat(MASKED, tw))
                f.put(x, weights, b.add(token, I64(r * page)))

    most = count = min(most_vectors, page // tw)
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
            hidden = b.fcmp_ordered("<", x, f.splat(MASKED / 2, tw))
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
    for at in range(0, len(columns), most_vectors):
        part = columns[at : at + most_vectors]
        sums = [
            b.fmul(f.load(acc, r * d + x, hw), f.splat(keeps[r], hw))
            for r in range(rows)
            for x in part
        ]

        def along(t: Value, *sums: Value, part=part) -> list[Value]:
            row = b.mul(t, I64(d))
            values = [f.load(v, b.add(row, I64(x)), hw, form.kv) for x in part]
            _fetch(f, form, next_v, b.add(row, I64(part[0])), hw * len(part))
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


def _fetch(f: Function, form: Form, base: Value, index: Value, count: int) -> None:
    """Asks for `count` elements from `index` on of what comes after a page, while that is computed:
    without it memory waits meanwhile."""
    size = BYTES[form.kv]
    place = f.at(base, index, size)
    for at in range(0, count * size, 64):
        f.fetch(f.at(place, at))
