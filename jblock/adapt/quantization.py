"""Quantizing a chain: another chain whose projections are weights of few bits, with an edge from each of
its components to the one it stands for."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from jblock.blocks import quantize
from jblock.blocks.layout import is_projection
from jblock.blocks.quant_spec import QuantSpec
from jblock.blocks.spec import QUANTIZABLE, AttentionSpec, ExpertSpec, FfnSpec
from jblock.zoo import edges
from jblock.zoo.edge_records import Edge, Score, versions
from jblock.zoo.records import Chain, Step, ZooError, check_name
from jblock.zoo.store import Zoo

Quantizable = AttentionSpec | FfnSpec | ExpertSpec


def quantize_chain(
    zoo: Zoo,
    chain: Chain,
    name: str,
    spec: QuantSpec,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> Chain:
    """Publishes a chain with the projections of every attention, ffn and expert of `chain` quantized.

    Norms, biases, routers, embedding and unembedding stay as they are, and adapters ride on. The result
    has policy "near". Weights are rounded one by one, without data (see `blocks.quantize`).

    Args:
      zoo: holds the chain.
      chain: to quantize.
      name: of the new chain.
      spec: bits and group.
      advance: called with the bytes of each component that is done.

    Raises:
      ZooError: the chain is quantized already, or `name` is its own.
    """
    if check_name(name) == chain.name:
        raise ZooError(f"--name {name!r} is the model itself: give the copy its own name")
    made: dict[str, str] = {}
    found: list[Edge] = []
    steps: list[Step] = []
    provenance = {"command": "quantize", "bits": spec.bits, "group": spec.group}
    error, norm, before, after = 0.0, 0.0, 0, 0
    with zoo.writer() as writer:
        for step in chain.steps:
            record = zoo.component(step.component)
            if not isinstance(record.spec, QUANTIZABLE):
                steps.append(step)
                advance(record.nbytes)
                continue
            if record.spec.quant is not None:
                raise ZooError(
                    f"{chain.name}@{chain.version} is quantized already: quantize what it was made from"
                )
            if step.component not in made:
                tensors = zoo.load_component(step.component)
                small, loss = _quantize(record.spec, tensors, spec)
                new = made[step.component] = writer.put_component(_spec(record.spec, spec), small)
                writer.advance()
                error, norm = error + loss[0], norm + loss[1]
                before += record.nbytes
                after += sum(t.nbytes for t in small.values())
                score = Score(value=math.sqrt(loss[0] / loss[1]) if loss[1] else 0.0)
                found.append(
                    Edge(
                        kind="quantized",
                        original=(Step(component=step.component),),
                        substitute=(Step(component=new),),
                        scores={"parameter_error": score},
                        provenance=provenance,
                        versions=versions(),
                    )
                )
            new = made[step.component]
            deltas = tuple(
                writer.put_delta(zoo.delta(d).spec, new, zoo.load_delta(d)) for d in step.deltas
            )
            steps.append(dataclasses.replace(step, component=new, deltas=deltas))
            advance(record.nbytes)
        how = {
            **provenance,
            "bytes_before": before,
            "bytes_after": after,
            "parameter_error": math.sqrt(error / norm) if norm else 0.0,
        }
        published = writer.publish(chain.derive(name, steps, ("near",), how))
        edges.put_edges(zoo, *found)
    return published


def _spec(spec: Quantizable, quant: QuantSpec) -> Quantizable:
    if isinstance(spec, ExpertSpec):
        return dataclasses.replace(spec, quant=quant)
    return dataclasses.replace(spec, quant=quant, transposed=False)


def _quantize(
    spec: Quantizable, tensors: Mapping[str, np.ndarray], quant: QuantSpec
) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """The stored tensors of a quantized component, and |difference|^2 and |original|^2 of its weights."""
    out: dict[str, np.ndarray] = {}
    error = norm = 0.0
    for tensor, value in tensors.items():
        if not is_projection(spec, tensor):
            out[tensor] = value
            continue
        projection = tensor.removesuffix(".weight")
        weight = value.T if getattr(spec, "transposed", False) else value
        codes = quantize.quantize(weight, quant)
        out |= {f"{projection}.{part}": array for part, array in codes.items()}
        wide = weight.astype(np.float32)
        error += float(np.sum((quantize.dequantize(out, projection, quant) - wide) ** 2))
        norm += float(np.sum(wide**2))
    return out, (error, norm)
