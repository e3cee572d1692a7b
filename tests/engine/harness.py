"""A zoo of the oracle's fixtures, and an agent driven step by step with its logits in reach."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np

from checkpoints import hf, peft
from checkpoints.progress import Progress
from jblock.engine.api import Output, Request, SamplingParams
from jblock.engine.config import EngineConfig
from jblock.engine.graph.build import assemble
from jblock.engine.graph.graph import ServingGraph
from jblock.engine.loop import Loop
from jblock.engine.programs.executable_cache import ExecutableCache, default_folder
from jblock.engine.runner.runner import Runner
from jblock.zoo.store import Zoo

FIXTURES = Path(__file__).parent.parent / "fixtures"
BASES = sorted(p.name for p in (FIXTURES / "hf").iterdir() if (p / "oracle.npz").exists())
ADAPTERS = sorted(p.name for p in (FIXTURES / "peft").iterdir() if (p / "oracle.npz").exists())

SMALL = EngineConfig(
    max_num_seqs=4,
    max_model_len=64,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((4, 16),),
    kv_memory_mb=1,
)


def base_of(adapter: str) -> str:
    """Name of the fixture an adapter was made on."""
    config = json.loads((FIXTURES / "peft" / adapter / "adapter_config.json").read_text())
    return config["base_model_name_or_path"]


def oracle(name: str) -> dict[str, np.ndarray]:
    """What transformers (and peft) computed for a fixture."""
    kind = "peft" if name in ADAPTERS else "hf"
    with np.load(FIXTURES / kind / name / "oracle.npz") as arrays:
        return dict(arrays)


def make_zoo(path: Path) -> Path:
    """Converts every fixture into a zoo."""
    quiet = Progress(False)
    for name in BASES:
        hf.convert(FIXTURES / "hf" / name, path, name, quiet)
    for name in ADAPTERS:
        peft.convert(FIXTURES / "peft" / name, path, base_of(name), name, quiet)
    return path


def shared_programs() -> ExecutableCache:
    """The compiled programs of the whole run: equal ones are compiled once."""
    return ExecutableCache(default_folder())


class LogitsRunner(Runner):
    """A device that keeps the logits it samples from, as (batch, float32 [S, vocab])."""

    def __init__(self, graph: ServingGraph, config: EngineConfig, cache: ExecutableCache):
        super().__init__(graph, config, cache)
        self.seen: list = []
        sample = self._sampler.sample

        def watched(logits, meta, batch, **options):
            # An item that decodes is the same one in every step.
            items = tuple(copy.copy(item) for item in batch.items)
            self.seen.append((dataclasses.replace(batch, items=items), np.asarray(logits)))
            return sample(logits, meta, batch, **options)

        self._sampler.sample = watched  # type: ignore[method-assign]


@dataclasses.dataclass
class Agent:
    """One agent on the test's own thread."""

    graph: ServingGraph
    device: LogitsRunner
    loop: Loop

    @classmethod
    def make(cls, zoo: Path, models: list[str], config: EngineConfig) -> "Agent":
        """Assembles `models` of a zoo; programs are made when first used, once for all tests."""
        store = Zoo.open(zoo)
        graph = assemble(store, {name: store.chain(name) for name in models}, config)
        device = LogitsRunner(graph, config, shared_programs())
        loop = Loop(graph, device, config)
        loop.loads.preload([r.needs for r in graph.routes.values()])
        return cls(graph, device, loop)

    def slow_down(self, factor: float) -> None:
        """Measures every program, and lets the batching policy believe in a device slower by `factor`."""
        while self.loop.measure():
            pass
        profile = self.loop.profile
        profile._seconds = {name: factor * s for name, s in profile._seconds.items()}
        profile.forget()

    def run(self) -> dict[str, list[Output]]:
        """Steps until nothing is left; outputs by request id."""
        outputs: dict[str, list[Output]] = {}
        while not self.loop.idle or not outputs:
            for output in self.loop.step():
                outputs.setdefault(output.request_id, []).append(output)
        return outputs

    def generate(
        self, prompts: dict[str, tuple[str, np.ndarray]], **sampling
    ) -> dict[str, list[int]]:
        """Runs requests {id: (model, prompt ids)} together; generated ids by request id."""
        for request_id, (model, prompt) in prompts.items():
            self.loop.submit(request(request_id, model, prompt, **sampling))
        return {i: [t for o in out for t in o.token_ids] for i, out in self.run().items()}


def request(request_id: str, model: str, prompt, **sampling) -> Request:
    """A request that runs to its length unless told otherwise."""
    options = {"max_tokens": 64, "ignore_eos": True, **sampling}
    return Request(
        request_id=request_id,
        model=model,
        token_ids=tuple(int(t) for t in prompt),
        sampling=SamplingParams(**options),
    )


def collect_tokens(engine, request_ids, outputs=()) -> dict[str, list[int]]:
    """Polls an engine until these requests ended well; their tokens, after those in `outputs`."""
    tokens: dict[str, list[int]] = {i: [] for i in request_ids}
    open_ids = set(request_ids)
    while True:
        for output in outputs:
            assert not output.error_message, output
            tokens[output.request_id].extend(output.token_ids)
            if output.finish_reason:
                open_ids.discard(output.request_id)
        if not open_ids:
            return tokens
        outputs = engine.poll(10)
