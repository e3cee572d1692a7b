"""What the demo family consists of: two bases, the fine-tunes of each, and the LoRA adapters."""

import dataclasses

from examples.train import data
from examples.train import model as llama


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A base trained from scratch.

    Attributes:
      name: directory under `models/`.
      config: dimensions.
      tokens: length of pretraining, in tokens.
      text_share: share of library text among them; generated facts are the rest.
      learning_rate: peak of the cosine schedule.
      row_tokens: tokens of a training row.
      batch_rows: rows of a training step.
    """

    name: str
    config: llama.Config
    tokens: int
    text_share: float = 0.4
    learning_rate: float = 3e-3
    row_tokens: int = 256
    batch_rows: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTune:
    """A model or an adapter trained on one task.

    Attributes:
      name: directory under `models/`, or under `adapters/` where `rank` is set.
      base: name of its base.
      task: name in `tasks.TASKS`.
      frozen_layers: how many of the lower layers stay as in the base; None trains everything
        (ignored for LoRA).
      rank: LoRA rank; 0 is a full checkpoint.
      alpha: LoRA alpha; the update is scaled by alpha / rank.
      modules: linear modules of every layer that carry LoRA.
      max_steps: training ends here if the validation target was not reached before.
      batch_rows: items of a training step.
      learning_rate: peak of the cosine schedule.
      target: training ends when this share of validation items is exact.
    """

    name: str
    base: str
    task: str
    frozen_layers: int | None = None
    rank: int = 0
    alpha: int = 0
    modules: tuple[str, ...] = ()
    max_steps: int = 1500
    batch_rows: int = 64
    learning_rate: float = 2e-3
    target: float = 0.985

    @property
    def kind(self) -> str:
        """One of "lora", "full" and "frozen"; a frozen one keeps all but its upper layers."""
        return "lora" if self.rank else "full" if self.frozen_layers is None else "frozen"

    def trains(self, tensor: str) -> bool:
        """Whether a base tensor is trained; in a frozen fine-tune, only the upper layers' are."""
        if self.kind != "frozen":
            return self.kind == "full"
        parts = tensor.split(".")
        return parts[1] == "layers" and int(parts[2]) >= self.frozen_layers


BASES = {
    base.name: base
    for base in (
        Base(
            name="demo-1m",
            config=llama.Config(
                vocab_size=data.VOCAB_SIZE, hidden_size=128, num_layers=4, num_heads=4,
                num_kv_heads=2, head_dim=32, ffn_size=384, tied=True,
            ),
            tokens=4_500_000,
        ),
        Base(
            name="demo-3m",
            config=llama.Config(
                vocab_size=data.VOCAB_SIZE, hidden_size=192, num_layers=6, num_heads=6,
                num_kv_heads=2, head_dim=32, ffn_size=576, tied=False,
            ),
            tokens=4_500_000,
            learning_rate=2e-3,
        ),
    )
}  # fmt: skip

FINE_TUNES = {
    tune.name: tune
    for tune in (
        FineTune(name="demo-3m-sort", base="demo-3m", task="sort", frozen_layers=4),
        FineTune(name="demo-3m-find", base="demo-3m", task="find", frozen_layers=4),
        FineTune(name="demo-3m-date", base="demo-3m", task="date", frozen_layers=3),
        FineTune(name="demo-1m-upper", base="demo-1m", task="upper", frozen_layers=2),
        FineTune(name="demo-1m-spell", base="demo-1m", task="spell", frozen_layers=2),
        FineTune(name="demo-1m-add", base="demo-1m", task="add", max_steps=3000),
        FineTune(
            name="demo-3m-reverse-lora8", base="demo-3m", task="reverse", rank=8, alpha=16,
            modules=llama.ATTENTION, learning_rate=4e-3,
        ),
        FineTune(
            name="demo-3m-next-lora16", base="demo-3m", task="next", rank=16, alpha=24,
            modules=llama.ATTENTION + llama.FFN, learning_rate=4e-3,
        ),
        FineTune(
            name="demo-1m-copy-lora4", base="demo-1m", task="copy", rank=4, alpha=8,
            modules=("q_proj", "v_proj"), learning_rate=4e-3,
        ),
        FineTune(
            name="demo-1m-largest-lora12", base="demo-1m", task="largest", rank=12, alpha=16,
            modules=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
            learning_rate=4e-3,
        ),
    )
}  # fmt: skip
