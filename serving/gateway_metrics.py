"""The metrics that gateways and load generators read, with the names and the meaning that vLLM gave them.

The Gateway API Inference Extension takes queued and running requests, KV usage and the adapters in use from
here. Its readers take the first series of a family, so there is one of each.
"""

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jblock.engine import api

# Adapters that the gauge names at most.
_MOST_ADAPTERS = 256
PREFIXES = {"jblock": "jblock_", "vllm": "vllm:"}


class GatewayCollector(Collector):
    """Read when scraped."""

    def __init__(
        self,
        prefix: str,
        stats: Callable[[], api.EngineStats],
        adapters: Callable[[], tuple[set[str], set[str]]],
    ):
        """`adapters` says which have requests that run, and which have only ones that wait."""
        self._prefix, self._stats, self._adapters = prefix, stats, adapters

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        used = 1 - stats.pages_free / stats.pages_total if stats.pages_total else 0.0
        gauges = {
            "num_requests_running": ("Sequences in flight.", stats.running),
            "num_requests_waiting": ("Requests that wait for their first step.", stats.waiting),
            "kv_cache_usage_perc": ("Share of the KV pages that sequences own, 0 to 1.", used),
        }
        counters = {
            "prefix_cache_queries": (
                "Prompt tokens looked up in the prefix cache.",
                stats.prompt_tokens + stats.cached_tokens,
            ),
            "prefix_cache_hits": ("Prompt tokens found there.", stats.cached_tokens),
            "num_preemptions": ("Sequences that gave their pages to others.", stats.preemptions),
            "generation_tokens": ("Tokens generated.", stats.generated_tokens),
            "spec_decode_num_draft_tokens": ("Tokens drafted.", stats.drafted_tokens),
            "spec_decode_num_accepted_tokens": ("Drafted tokens taken.", stats.accepted_tokens),
        }
        if self._prefix == PREFIXES["vllm"]:
            # `jblock_prompt_tokens` counts what was computed.
            counters["prompt_tokens"] = (
                "Prompt tokens, computed or found in the prefix cache.",
                stats.prompt_tokens + stats.cached_tokens,
            )
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(self._prefix + name, text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(self._prefix + name, text, value=value)
        yield self._lora(stats)

    def _lora(self, stats: api.EngineStats) -> Metric:
        """The adapters in use, as labels; its value is the time, the largest is the one that counts."""
        family = GaugeMetricFamily(
            self._prefix + "lora_requests_info",
            "Adapters with open requests; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        running, waiting = (",".join(sorted(names)[:_MOST_ADAPTERS]) for names in self._adapters())
        family.add_metric([str(stats.adapter_slots), running, waiting], time.time())
        return family
