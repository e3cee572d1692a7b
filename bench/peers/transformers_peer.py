"""transformers and PEFT: a greedy loop over `forward`, which brings every stream's token at each step.

Requests to the base and to its adapters share one batch (PEFT's `adapter_names`); every full model
has a batch of its own, one after another. `generate` would do the same steps but streams one
sequence at most.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.peers.load import Clock, main


class TransformersPeer:
    """See load.Peer."""

    def __init__(self, spec: Mapping[str, Any]):
        """Loads every model, and every adapter on the base."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(spec["threads"])
        torch.set_grad_enabled(False)
        self.notes = {"arrangement": "base and adapters in one batch, models one after another"}
        self._adapters = list(spec["adapters"])
        self._models = {
            name: AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, spec["dtype"]))
            for name, path in spec["models"].items()
        }
        if self._adapters:
            from peft import PeftModel

            first, *others = self._adapters
            base = PeftModel.from_pretrained(
                self._models["base"], spec["adapters"][first], adapter_name=first
            )
            for name in others:
                base.load_adapter(spec["adapters"][name], adapter_name=name)
            self._models["base"] = base
        for model in self._models.values():
            model.eval()

    def run(self, clock: Clock) -> None:
        """See load.Peer."""
        groups: dict[str, list[int]] = {}
        for i, ask in enumerate(clock.asks):
            groups.setdefault("base" if ask.model in self._adapters else ask.model, []).append(i)
        for name, members in sorted(groups.items(), key=lambda item: -len(item[1])):
            self._batch(name, members, clock)

    def close(self) -> None:
        """See load.Peer."""

    def _batch(self, name: str, members: Sequence[int], clock: Clock) -> None:
        import torch

        asks = [clock.asks[i] for i in members]
        # Requests of one batch are alike in this work, so nothing is padded.
        if len({(len(a.prompt), a.max_tokens) for a in asks}) != 1:
            raise ValueError("requests of one batch must have equal lengths; send them apart")
        options: dict[str, Any] = {}
        if self._adapters and name == "base":
            options["adapter_names"] = [
                a.model if a.model in self._adapters else "__base__" for a in asks
            ]
        model = self._models[name]
        ids = torch.tensor([a.prompt for a in asks])
        cache = None
        for _ in range(asks[0].max_tokens):
            out = model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **options
            )
            cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            for i, token in zip(members, ids.tolist(), strict=True):
                clock.note(i, token)


if __name__ == "__main__":
    main(TransformersPeer)
