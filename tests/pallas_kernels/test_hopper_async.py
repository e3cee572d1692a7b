"""When operands of asynchronous products may be overwritten: `hopper.py` itself, on a model of tensor cores
that read them as late as they may.

Waiting until n products are outstanding completes the oldest ones, not the n newest (wgmma.wait_group in the
PTX ISA).
"""

import types

import numpy as np
import pytest

from jblock.pallas_kernels import hopper

STAGES, STEPS = 3, 7


class TensorCores:
    """Products in flight, and a ring of operands that is poisoned once it is given back."""

    def __init__(self, a, b):
        self.a, self.b = a, b
        self.in_flight, self.sum = [], np.zeros((a.shape[1], b.shape[1]), np.float32)
        self.ring = [None] * STAGES

    def __getitem__(self, _):
        assert not self.in_flight, "the sum is read before its products are done"
        return self.sum

    def arrived(self, i):
        self.ring[i % STAGES] = [self.a[i].copy(), self.b[i].copy()]

    def operands(self, i):
        return self.ring[i % STAGES]

    def released(self, i):
        for operand in self.ring[i % STAGES]:
            operand[...] = np.nan  # what comes next may be written at once

    def multiply(self, acc, a, b):
        self.in_flight.append((a, b))

    def wait(self, outstanding):
        while len(self.in_flight) > outstanding:
            a, b = self.in_flight.pop(0)
            self.sum = self.sum + a @ b


@pytest.fixture
def cores(monkeypatch):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    cores = TensorCores(draw(STEPS, 8, 4), draw(STEPS, 6, 4))

    def run_loop(first, end):
        return lambda body: [body(i) for i in range(first, end)]

    pl = types.SimpleNamespace(
        run_scoped=lambda run, acc: run(acc),
        loop=run_loop,
        when=lambda condition: lambda run: run() if condition else None,
    )
    plgpu = types.SimpleNamespace(
        ACC=lambda shape, dtype: cores,
        wgmma=cores.multiply,
        wgmma_wait=cores.wait,
        transpose_ref=np.transpose,
    )
    monkeypatch.setattr(hopper, "pl", pl)
    monkeypatch.setattr(hopper, "plgpu", plgpu)
    return cores


def total(cores, released):
    shape = cores.sum.shape
    return hopper.sum_of_products(shape, STEPS, cores.arrived, cores.operands, released)


def test_operands_are_given_back_once_they_were_read(cores):
    given = []

    def released(i):
        given.append(i)
        cores.released(i)

    wanted = np.einsum("imk,ink->mn", cores.a, cores.b)
    np.testing.assert_allclose(total(cores, released), wanted, rtol=1e-5, atol=1e-5)
    assert given == list(range(STEPS))


def test_operands_given_back_one_product_early_are_seen(cores):
    def early(i):
        cores.released(min(i + 1, STEPS - 1))

    assert np.isnan(total(cores, early)).any()
