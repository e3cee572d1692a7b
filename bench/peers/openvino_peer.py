"""OpenVINO GenAI's continuous batching: a pipeline a full model, stepped until its requests are done.

Adapters are fused into pipelines of their own: the pipeline takes one set of adapters a step, so
requests of different adapters never share a batch. Pipelines take turns, since each uses every CPU.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.peers.load import Clock, main


class OpenvinoPeer:
    """See load.Peer."""

    def __init__(self, spec: Mapping[str, Any]):
        """Compiles a pipeline a model and one an adapter."""
        import openvino_genai as genai

        self.notes = {"arrangement": "a pipeline a tenant, adapters fused, one after another"}
        sizes = spec["sizes"]
        scheduler = genai.SchedulerConfig()
        streams = max(*sizes["streams"], sizes["requests"])
        scheduler.max_num_seqs = streams
        scheduler.max_num_batched_tokens = 2 * sizes["prefill"]
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        # Enough for all streams of one model at their longest.
        at_once = streams if spec["work"] == "single" else sizes["requests"]
        scheduler.num_kv_blocks = 1 + at_once * -(-sizes["max_len"] // 32)
        exact = {"float32": "f32", "bfloat16": "bf16"}[spec["dtype"]]
        properties = {
            "INFERENCE_PRECISION_HINT": exact,
            "KV_CACHE_PRECISION": exact,
            "INFERENCE_NUM_THREADS": spec["threads"],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        prepared = Path(spec["folder"], "ir")

        def pipeline(model: str, **more: Any):
            return genai.ContinuousBatchingPipeline(
                str(prepared / model), scheduler, "CPU", properties | more
            )

        self._pipelines = {name: pipeline(name) for name in spec["models"]}
        for name, path in spec["adapters"].items():
            adapter = genai.Adapter(str(Path(path, "adapter_model.safetensors")))
            # The file does not say by how much it is scaled, and GenAI reads no other.
            config = json.loads(Path(path, "adapter_config.json").read_text())
            fused = genai.AdapterConfig(genai.AdapterConfig.Mode.MODE_FUSE)
            fused.add(adapter, config["lora_alpha"] / config["r"])
            self._pipelines[name] = pipeline("base", adapters=fused)

    def run(self, clock: Clock) -> None:
        """See load.Peer."""
        groups: dict[str, list[int]] = {}
        for i, ask in enumerate(clock.asks):
            groups.setdefault(ask.model, []).append(i)
        for name, members in groups.items():
            self._batch(self._pipelines[name], members, clock)

    def close(self) -> None:
        """See load.Peer."""
        self._pipelines.clear()

    @staticmethod
    def _batch(pipeline: Any, members: Sequence[int], clock: Clock) -> None:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        handles = {}
        for i in members:
            ask = clock.asks[i]
            config = genai.GenerationConfig()
            config.max_new_tokens = ask.max_tokens
            config.ignore_eos = True
            config.do_sample = False
            ids = ov.Tensor(np.array([ask.prompt], np.int64))
            handles[i] = pipeline.add_request(i, ids, config)
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for i, handle in handles.items():
                while handle.can_read():
                    for output in handle.read().values():
                        clock.note(i, output.generated_ids)


def prepare(models: Mapping[str, str], folder: Path, dtype: str) -> None:
    """Exports checkpoints to OpenVINO's format, with a tokenizer that nothing uses but the pipeline
    wants to see."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    for name, path in models.items():
        target = folder / "ir" / name
        if (target / "openvino_tokenizer.xml").exists():
            continue
        model = OVModelForCausalLM.from_pretrained(
            path, export=True, compile=False, load_in_8bit=False
        )
        if dtype == "bfloat16":
            model.half()
        model.save_pretrained(target)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {c: i for i, c in enumerate(alphabet)}
        tokenizer = Tokenizer(kinds.BPE(vocab=vocab, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0])
        both = convert_tokenizer(wrapped, with_detokenizer=True)
        for part, file in zip(both, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
            ov.save_model(part, target / f"{file}.xml")


if __name__ == "__main__":
    spec = json.loads(Path(sys.argv[1]).read_text())
    os.environ.setdefault("OMP_NUM_THREADS", str(spec["threads"]))
    if spec["work"] == "prepare":
        prepare(spec["models"], Path(spec["folder"]), spec["dtype"])
    else:
        main(OpenvinoPeer)
