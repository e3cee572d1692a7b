"""vLLM's CPU build: an engine a full model, the adapters on the base's, tokens as they come.

Engines have a process each and as many OpenMP threads as there are CPUs. They take turns
(`arrangement` "sequential"): four engines that compute at the same time on two CPUs ("concurrent") only
get in each other's way. Which was better is for the caller to measure.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers.load import Clock, main


class VllmPeer:
    """See load.Peer."""

    def __init__(self, spec: Mapping[str, Any]):
        """Starts one engine after another; each takes its share of memory then."""
        concurrent = spec.get("arrangement", "sequential") == "concurrent"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        cpus = "nobind" if concurrent else f"0-{spec['threads'] - 1}"
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cpus)
        os.environ.setdefault("OMP_NUM_THREADS", str(spec["threads"]))
        os.environ.setdefault("VLLM_CACHE_ROOT", f"{spec['folder']}/cache")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self.notes = {"arrangement": "concurrent" if concurrent else "sequential"}
        self._concurrent = concurrent
        self._loop = asyncio.new_event_loop()
        self._loras = {
            name: LoRARequest(name, i, path)
            for i, (name, path) in enumerate(sorted(spec["adapters"].items()), 1)
        }
        sizes = spec["sizes"]
        self._engines = {}
        for name, path in spec["models"].items():
            lora = (
                {
                    "enable_lora": True,
                    "max_loras": len(self._loras),
                    "max_lora_rank": max(8, sizes["rank"]),
                    "max_cpu_loras": len(self._loras),
                }
                if self._loras and name == "base"
                else {}
            )
            args = AsyncEngineArgs(
                model=path,
                skip_tokenizer_init=True,
                dtype=spec["dtype"],
                max_model_len=sizes["max_len"],
                max_num_seqs=max(*sizes["streams"], sizes["requests"]),
                enable_prefix_caching=False,
                disable_log_stats=True,
                **lora,
            )
            self._engines[name] = self._loop.run_until_complete(self._start(AsyncLLM, args))

    @staticmethod
    async def _start(engine_type, args):
        return engine_type.from_engine_args(args)

    def run(self, clock: Clock) -> None:
        """See load.Peer."""
        self._loop.run_until_complete(self._run(clock))

    def close(self) -> None:
        """See load.Peer."""
        for engine in self._engines.values():
            engine.shutdown()

    async def _run(self, clock: Clock) -> None:
        groups: dict[str, list[int]] = {}
        for i, ask in enumerate(clock.asks):
            groups.setdefault("base" if ask.model in self._loras else ask.model, []).append(i)
        # Those with most requests first: the greatest share of all then waits least.
        ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
        jobs = [self._group(name, members, clock) for name, members in ordered]
        if self._concurrent:
            await asyncio.gather(*jobs)
            return
        for job in jobs:
            await job

    async def _group(self, name: str, members: Sequence[int], clock: Clock) -> None:
        await asyncio.gather(*(self._stream(self._engines[name], i, clock) for i in members))

    async def _stream(self, engine, i: int, clock: Clock) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ask = clock.asks[i]
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        stream = engine.generate(
            {"prompt_token_ids": list(ask.prompt)},
            sampling,
            request_id=f"{id(clock)}-{i}",
            lora_request=self._loras.get(ask.model),
        )
        async for output in stream:
            clock.note(i, output.outputs[0].token_ids)


if __name__ == "__main__":
    main(VllmPeer)
