"""The named scenarios. Each measures what its interleaved repetitions show within one run."""

import argparse
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One thing that can be measured.

    Attributes:
      name: of the command and of the module beside this file.
      summary: one line for the help.
    """

    name: str
    summary: str

    @property
    def run(self) -> Callable[[argparse.Namespace], dict[str, Any]]:
        """The measurement: parsed flags to the keys of the JSON line."""
        return self._module.run

    @property
    def add_arguments(self) -> Callable[[argparse.ArgumentParser], None] | None:
        """Adds the scenario's own flags, if it has any."""
        return getattr(self._module, "add_arguments", None)

    @property
    def _module(self):
        return importlib.import_module(f"bench.scenarios.{self.name}")


_ALL = (
    Scenario("block_tax", "a decode step through blocks over the same step as one program"),
    Scenario("roofline", "decode and prefill over what the memory and the matmuls allow"),
    Scenario("sharing", "eight fine-tunes from shared blocks over one whole model each"),
    Scenario("lora", "64 adapters of three ranks in one batch over the base alone"),
    Scenario("prefix", "time to first token behind a prefix that was seen before"),
    Scenario(
        "trunk", "time to first token of a prompt that another fine-tune of the trunk has had"
    ),
    Scenario("alora", "time to first token of an adapter invoked behind what its base has had"),
    Scenario("host", "the host's work of a step, its programs empty, over an earlier commit's"),
    Scenario("overlap", "the device's idle share while decoding, from a trace of XLA's profiler"),
    Scenario("stalls", "gaps between the tokens of streams while long prompts arrive"),
    Scenario("hotswap", "gaps between tokens while chains, weights and programs are swapped"),
    Scenario("coldstart", "process start to first token, with and without compiled programs"),
    Scenario(
        "restart", "engine processes killed and stopped under 24 streams: lost, differing, pause"
    ),
    Scenario(
        "cluster", "a model in spans on two processes of a core each over one; what a hop takes"
    ),
    Scenario(
        "one_agent", "an agent of several, and one behind the scheduler, over an engine by itself"
    ),
    Scenario(
        "faults", "what goes wrong between and in several agents, and what it does to answers"
    ),
    Scenario(
        "adaptive",
        "requests that accept recorded equivalents, where memory holds no more, over others",
    ),
    Scenario("speculate", "tokens a second with guessed tokens over those without"),
    Scenario("front", "gRPC and HTTP over the engine alone, and over bare servers of constants"),
    Scenario(
        "structured",
        "answers that keep to a schema over free ones, and schemas that explode beside",
    ),
    Scenario("memory", "resident bytes of one model, seven, five with two compressed"),
    Scenario("peers", "vLLM, OpenVINO GenAI and transformers on the same work and machine"),
    Scenario("kv", "int8 KV over float32: bytes, speed over long contexts, changed answers"),
    Scenario("oversubscription", "KV for a quarter of what is offered: all finish, all the same"),
    Scenario(
        "fairness", "tenants on one engine: the bound of fair shares in twelve workloads, its cost"
    ),
    Scenario("equivalence", "a search for components that are alike, among a thousand of 8 MB"),
    Scenario(
        "zoo", "bytes stored of 64 fine-tunes over what they take apart, and of each kind alone"
    ),
    Scenario(
        "convert",
        "a large checkpoint into a zoo: speed over copying, memory, going on after a kill",
    ),
    Scenario(
        "registry", "a zoo of ten thousand models: adding one, listing all, files a component"
    ),
    Scenario("deltas", "bytes against accuracy of compressed fine-tunes and quantized models"),
    Scenario("adapt", "measuring, compressing and distilling a layer, and a model of such layers"),
    Scenario("cycles", "each kernel's cycles, counted in what the real compilers emit"),
    Scenario("kernels", "each kernel alone on this device, over what copies and matmuls reach"),
    Scenario(
        "gpu", "the Hopper kernels' tests and figures on a lent GPU; says so if there is none"
    ),
)
SCENARIOS = {s.name: s for s in _ALL}
