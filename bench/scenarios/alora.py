"""A prompt that a base has had, asked of an activated LoRA whose invocation ends it, and of a plain one."""

import argparse
import statistics
from typing import Any

from bench.models import MODEL_250M, TINY, MemoryZoo
from bench.report import progress, spread
from bench.scenarios.trunk import Asker
from bench.stepper import Stepper
from jblock.engine.config import DTYPES, EngineConfig

_PAGE, _BEHIND, _RANK = 16, 16, 8
# Ids that the prompts drawn do not have: the last ones of the vocabulary.
_INVOCATION = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The scenario's own flags."""
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--prompts", type=int, default=7, help="asked of both adapters")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Time to first token of the activated LoRA over the plain one's."""
    shape, length = (TINY, 128) if args.quick else (MODEL_250M, 1024)
    tokens = tuple(range(shape.vocab_size - _INVOCATION, shape.vocab_size))
    zoo = MemoryZoo(shape)
    zoo.add_base("base")
    zoo.add_adapter("plain", "base", _RANK)
    zoo.add_adapter("activated", "base", _RANK, invocation=tokens)
    config = EngineConfig(
        dtype=args.dtype,
        max_num_seqs=4,
        max_model_len=length + 4 * _PAGE,
        page_size=_PAGE,
        kv_memory_mb=8 + 8 * length * 4 * shape.kv_floats_per_token // 10**6,
        decode_sizes=(1,),
        prefill_grids=((1, 16), (1, 64), (1, min(length, 256))),
        adapter_slots=2,
    )
    progress(f"loading and compiling a model of {shape.layers} layers and two adapters")
    asker = Asker(Stepper(zoo, dict(zoo.served), config, args.cache))
    for name in zoo.served:  # The first touch of weights and pages is nobody's time.
        asker.ask(name, asker.stepper.prompt(name, length), f"first {name}")
    ratios, same = [], []
    for i in range(2 if args.quick else args.prompts):
        drawn = asker.stepper.prompt("base", length - len(tokens))
        at = length - _BEHIND
        prompt = [token % (shape.vocab_size - _INVOCATION) for token in drawn]
        prompt = [*prompt[:at], *tokens, *prompt[at:]]
        _, _, wanted = asker.ask("activated", prompt, f"nobody {i}")
        asker.ask("base", prompt[:at], f"tenant {i}")
        activated, _, got = asker.ask("activated", prompt, f"tenant {i}")
        plain, _, _ = asker.ask("plain", prompt, f"tenant {i}")
        ratios.append(activated / plain)
        same.append(got == wanted)
        progress(f"{activated * 1e3:.1f} ms, plain {plain * 1e3:.1f} ms, same {same[-1]}")
    return {
        "alora": {
            "ttft_ratio": round(statistics.median(ratios), 4),
            "identical": all(same),
        },
        "dtype": args.dtype,
        "detail": {"ttft_ratio": spread(ratios), "tokens": length, "behind": _BEHIND},
        "compiles_on_serving_path": asker.stepper.stats().compiles_on_serving_path,
    }
