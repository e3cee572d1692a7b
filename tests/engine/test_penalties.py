"""Penalties and biases against a plain reading of what Hugging Face and OpenAI say they do."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jblock.engine.api import Request, SamplingParams
from jblock.engine.config import Bucket
from jblock.engine.programs import logprobs
from jblock.engine.programs import penalties as adjust
from jblock.engine.runner.batch import Batch, control_array
from jblock.engine.scheduling.sequence import SequenceState, WorkItem
from jblock.engine.weights.lease import Lease

VOCAB, SLOTS = 30, 5
run = jax.jit(adjust.adjust)


class Route:
    """As much of a route as the control array looks at."""

    virtual_tokens = 0
    boundaries = ()
    kv_digests: ClassVar[dict] = {}
    plain_digests = None

    class chain:
        eos_token_ids = (2,)
        invocation = ()


def item(slot: int, prompt, generated, decoding: bool, **sampling) -> WorkItem:
    """The item whose logits pick the token after `generated`."""
    request = Request(
        request_id=str(slot), model="m", token_ids=prompt, sampling=SamplingParams(**sampling)
    )
    sequence = SequenceState(
        request, Route, 64, 0, Lease(Route), seq_slot=slot, generated=list(generated)
    )
    known = (*prompt, *generated)
    start = len(known) - 1 if decoding else 0
    tokens = () if decoding else known
    return WorkItem(sequence, start, len(known) - start, 1, [0], tokens, True)


def adjusted(logits, items, counts=None, last=None):
    """Adjusted logits and counts of one call."""
    counts = jnp.zeros((SLOTS, VOCAB), jnp.int32) if counts is None else counts
    last = np.zeros(SLOTS, np.int32) if last is None else last
    meta = np.zeros((len(logits), 4), np.int32)
    for i, one in enumerate(items):
        meta[i] = one.start, one.q_len, 0, one.sequence.seq_slot
    controls = control_array(Batch(Bucket(len(logits), 1), tuple(items)))
    return run(jnp.asarray(logits), counts, last, meta, controls)


def reference(row, prompt, generated, params: SamplingParams, ends=(2,)):
    """One row, token by token."""
    out = row.astype(np.float64)
    for token, value in params.logit_bias:
        out[token] += value
    for token in set(prompt) | set(generated):
        out[token] *= params.repetition_penalty if out[token] < 0 else 1 / params.repetition_penalty
    for token in set(generated):
        out[token] -= params.presence_penalty
        out[token] -= params.frequency_penalty * list(generated).count(token)
    if len(generated) < params.min_tokens:
        out[[*ends, *params.stop_token_ids]] = -np.inf
    return out


CASES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.8},
    {"logit_bias": ((4, 3.5), (29, -100.0))},
    {"min_tokens": 7, "stop_token_ids": (8, 9)},
    {"min_tokens": 5, "stop_token_ids": (8, 9)},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": ((2, 50.0), (6, -1.0)),
        "min_tokens": 20,
    },
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "+".join(o))
@pytest.mark.parametrize("decoding", [False, True])
def test_adjusts_as_the_reference_does(options, decoding):
    logits = np.random.default_rng(0).normal(size=(3, VOCAB)).astype(np.float32) * 4
    prompt, generated = (3, 4, 4, 5), (4, 6, 6, 28, 6)
    before = generated[:-1] if decoding else generated
    counts = np.full((SLOTS, VOCAB), 12345, np.int32)  # What an earlier owner left.
    counts[3] = adjust.count_row(prompt, list(before), VOCAB)
    last = np.full(SLOTS, generated[-1], np.int32)
    items = [
        item(1, prompt, generated, True),
        item(3, prompt, generated, decoding, **options),
    ]
    got, counted = adjusted(logits, items, jnp.asarray(counts), last)
    want = reference(logits[1], prompt, generated, SamplingParams(**options))
    np.testing.assert_allclose(np.asarray(got)[1], want, rtol=1e-6, atol=1e-6)
    # Rows that ask for nothing, and padding, are what they were, bit for bit.
    np.testing.assert_array_equal(np.asarray(got)[[0, 2]], logits[[0, 2]])
    np.testing.assert_array_equal(
        np.asarray(counted)[3], adjust.count_row(prompt, list(generated), VOCAB)
    )
    others = [0, 1, 2, 4]
    np.testing.assert_array_equal(np.asarray(counted)[others], counts[others])


def test_repetition_penalty_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    logits = np.random.default_rng(1).normal(size=(1, VOCAB)).astype(np.float32) * 3
    known = (3, 4, 4, 17)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    want = processor(torch.tensor([known]), torch.tensor(logits.copy())).numpy()
    counts = jnp.asarray(np.tile(adjust.count_row(known[:2], list(known[2:]), VOCAB), (SLOTS, 1)))
    one = item(0, known[:2], known[2:], False, repetition_penalty=1.7)
    got, _ = adjusted(logits, [one], counts)
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6)


def test_top_logprobs_are_the_best_in_order():
    logits = np.random.default_rng(2).normal(size=(4, VOCAB)).astype(np.float32)
    logits[1, 7] = logits[1, 11] = 9.0
    rows = np.asarray(jax.jit(logprobs.top_logprobs)(logits))
    want = np.asarray(jax.nn.log_softmax(logits))
    for i in range(4):
        best = logprobs.best_tokens(rows[i], 6)
        order = np.argsort(-logits[i], kind="stable")[:6]
        assert [token for token, _ in best] == order.tolist()
        np.testing.assert_allclose([p for _, p in best], want[i, order], atol=1e-6)
