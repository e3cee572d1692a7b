"""One prompt asked of several fine-tunes of one trunk: what the second and later ones save."""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.models import MODEL_250M, TINY, MemoryZoo, ModelShape, fine_tunes
from bench.report import progress, spread
from bench.stepper import Stepper
from jblock.engine.api import Request, SamplingParams
from jblock.engine.config import DTYPES, EngineConfig
from jblock.engine.graph.graph import Layer
from jblock.zoo.records import Chain

_PAGE = 64
_ANSWER = 4
_LENGTHS = (1024, 960, 1000, 1088, 1024)  # one is no multiple of a page
_QUICK_LENGTHS = (128, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--models", type=int, default=8, help="fine-tunes of the trunk")
    parser.add_argument("--mesh", default="", help="devices, such as tp=2")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time to first token and FLOPs of a prompt that another model has had, over those without a cache; and
    whether tokens and log-probabilities are the same to the bit."""
    shape, lengths = (TINY, _QUICK_LENGTHS) if args.quick else (MODEL_250M, _LENGTHS)
    models = min(args.models, 3) if args.quick else args.models
    own = shape.layers // 4
    tunes = fine_tunes(shape, models, own)
    adapters = MemoryZoo(shape)
    adapters.add_base("base")
    for i in range(models):
        adapters.add_adapter(f"adapter-{i}", "base", 8, first_layer=shape.layers - own)
    served = {n: c for n, c in adapters.served.items() if n != "base"}
    sides = {
        "finetunes": _measure(tunes, tunes.served, shape, lengths, args),
        "adapters": _measure(adapters, served, shape, lengths, args),
    }
    return {
        "trunk": {
            "ttft_ratio": max(side["ttft_ratio"] for side in sides.values()),
            "prefill_flops_ratio": max(side["prefill_flops_ratio"] for side in sides.values()),
            "identical": all(side["identical"] for side in sides.values()),
        },
        "dtype": args.dtype,
        "mesh": args.mesh,
        "detail": sides,
        "compiles_on_serving_path": sum(
            side.pop("compiles_on_serving_path") for side in sides.values()
        ),
    }


def _measure(
    zoo: MemoryZoo,
    chains: dict[str, Chain],
    shape: ModelShape,
    lengths: Sequence[int],
    args: argparse.Namespace,
) -> dict[str, Any]:
    longest = -(-(max(lengths) + _ANSWER) // _PAGE) * _PAGE
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=4,
        max_model_len=longest,
        page_size=_PAGE,
        kv_memory_mb=8 + 5 * longest * 4 * shape.kv_floats_per_token // 10**6,
        decode_sizes=(1,),
        prefill_grids=((1, 16), (1, 64), (1, min(max(lengths), 256))),
        adapter_slots=len(chains),
        mesh=args.mesh,
    )
    names = sorted(chains)
    progress(f"loading and compiling {len(names)} models of {shape.layers} layers")
    asker = Asker(Stepper(zoo, chains, config, args.cache))
    for name in names:  # The first touch of weights and pages is nobody's time.
        asker.ask(name, asker.stepper.prompt(name, lengths[0]), f"first {name}")
    times, flops, details, same = [], [], [], []
    for i, length in enumerate(lengths):
        prompt = asker.stepper.prompt(names[0], length)
        ratios, work = [], []
        for j, name in enumerate(names):
            cold, cold_flops, wanted = asker.ask(name, prompt, f"nobody {i} {j}")
            warm, warm_flops, got = asker.ask(name, prompt, f"tenant {i}")
            same.append(got == wanted)
            if j:
                ratios.append(warm / cold)
                work.append(warm_flops / cold_flops)
        times.append(statistics.median(ratios))
        flops.append(statistics.fmean(work))
        details.append(
            {"tokens": length, "ttft_ratio": spread(ratios), "flops": round(flops[-1], 4)}
        )
        progress(f"{length} tokens: {details[-1]}, same {sum(same)} of {len(same)}")
    stats = asker.stepper.stats()
    return {
        "ttft_ratio": round(statistics.fmean(times), 4),
        "prefill_flops_ratio": round(statistics.fmean(flops), 4),
        "identical": all(same),
        "same": f"{sum(same)} of {len(same)}",
        "prompts": details,
        "compiles_on_serving_path": stats.compiles_on_serving_path,
    }


class Asker:
    """Asks one engine, one request after another.

    Attributes:
      stepper: the engine.
    """

    def __init__(self, stepper: Stepper):
        self.stepper = stepper
        self._flops = 0
        self._count = 0
        self._run = stepper.device.run
        stepper.device.run = self._counted  # type: ignore[method-assign]

    def _counted(self, instance, batch, tables, first=0, last=None):
        """Counts matrix products of what a call carries, its padding included."""
        rows = batch.bucket.num_seqs * (1 if instance.is_head else batch.bucket.q_len)
        layers = instance.layers[first:last]
        if instance.kind != "embedding":
            self._flops += rows * sum(map(_weights, layers))
        return self._run(instance, batch, tables, first, last)

    def ask(
        self, model: str, prompt: Sequence[int], tenant: str
    ) -> tuple[float, int, list[tuple[int, float]]]:
        """Seconds to the first token, products until then, and tokens with their log-probabilities."""
        self._count += 1
        self._flops = 0
        loop, answer = self.stepper.loop, []
        seconds, flops = 0.0, 0
        begin = time.perf_counter()
        loop.submit(
            Request(
                request_id=f"ask{self._count}",
                model=model,
                token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=_ANSWER, ignore_eos=True, logprobs=True),
                cache_salt=tenant,
            )
        )
        while not loop.idle:
            before = self._flops
            for output in loop.step():
                if output.error_message:
                    raise RuntimeError(output.error_message)
                if not seconds:
                    # The step that brought it enqueued the next one's work first.
                    seconds, flops = time.perf_counter() - begin, before
                answer += zip(output.token_ids, output.logprobs, strict=True)
        return seconds, flops, answer


def _weights(layer: Layer) -> int:
    """Numbers in the matrices of a layer."""
    shapes = (s for spec in layer.signature.specs for s in spec.tensors().values())
    return sum(int(np.prod(s)) for s in shapes if len(s) == 2)
