"""Which requests arrive when: seeded, plain numpy, no engine.

Open loop: arrivals do not wait for answers. Closed backlog: everything is there at time 0 and the
number in flight is bounded.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

QUANTILES = (0, 5, 10, 25, 50, 75, 90, 95, 99, 100)
# Quantiles of ContextTokens and GeneratedTokens in the Azure LLM inference trace 2023, published with
# Splitwise (arXiv 2311.18677) at github.com/Azure/AzurePublicDataset under CC BY; worked out from its
# 19,366 conversation and 8,819 code requests.
AZURE_2023: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "conversation": (
        (2, 181, 207, 396, 1020, 1189, 2734, 4083, 4142, 14050),
        (7, 41, 54, 85, 129, 395, 424, 451, 601, 1000),
    ),
    "code": (
        (3, 75, 147, 578, 1469, 2744, 5188, 7303, 7436, 7437),
        (6, 6, 7, 9, 13, 24, 55, 90, 251, 1899),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request to come.

    Attributes:
      time: seconds after the start at which it is due.
      model: chain name.
      prompt: token ids.
      max_tokens: tokens to generate; generation runs to its length.
    """

    time: float
    model: str
    prompt: tuple[int, ...]
    max_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """How long prompts and answers are, in tokens: uniform between two bounds, both included, or by
    the quantiles of a trace, scaled and bounded to what the engine serves.

    Attributes:
      prompt: least and greatest length of a prompt.
      output: least and greatest length of an answer.
      trace: key of AZURE_2023, or "" for uniform lengths.
      scale: multiplies the trace's lengths before they are bounded.
    """

    prompt: tuple[int, int]
    output: tuple[int, int]
    trace: str = ""
    scale: float = 1.0

    def __post_init__(self):
        for low, high in (self.prompt, self.output):
            if not 1 <= low <= high:
                raise ValueError(f"lengths {low} to {high}: give 1 <= least <= greatest")
        if self.trace and self.trace not in AZURE_2023:
            raise ValueError(f"trace {self.trace!r} is not known; known: {', '.join(AZURE_2023)}")

    def draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and output lengths of `count` requests."""
        if not self.trace:
            return tuple(
                rng.integers(low, high, count, endpoint=True)
                for low, high in (self.prompt, self.output)
            )
        return tuple(
            np.clip(
                np.rint(self.scale * np.interp(rng.uniform(0, 100, count), QUANTILES, table)),
                *bounds,
            ).astype(int)
            for table, bounds in zip(
                AZURE_2023[self.trace], (self.prompt, self.output), strict=True
            )
        )


def uniform(count: int) -> np.ndarray:
    """Every one of `count` models equally popular."""
    return np.full(count, 1.0 / count)


def zipf(count: int, exponent: float) -> np.ndarray:
    """Popularity of the i-th model proportional to 1 / i^exponent."""
    weights = np.arange(1, count + 1, dtype=float) ** -exponent
    return weights / weights.sum()


def power_law(count: int, alpha: float) -> np.ndarray:
    """Popularity by a power-law draw: model i gets (i/n)^alpha - ((i-1)/n)^alpha. alpha 1 is uniform,
    smaller is more skewed (the adapter popularity of S-LoRA, arXiv 2311.03285).

    Raises:
      ValueError: alpha is not in (0, 1].
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give more than 0 and at most 1")
    return np.diff((np.arange(count + 1) / count) ** alpha)


def gamma_arrivals(rng: np.random.Generator, count: int, rate: float, cv: float) -> np.ndarray:
    """Arrival times in seconds, ascending: gaps are gamma with mean 1 / rate and coefficient of
    variation `cv` (1 is a Poisson process, 0 a metronome, more is bursty).

    Raises:
      ValueError: rate is not positive, or cv negative.
    """
    if rate <= 0 or cv < 0:
        raise ValueError(f"rate {rate}, cv {cv}: give a positive rate and cv of 0 or more")
    if cv < 1e-6:  # a gamma this narrow overflows before it differs from its mean
        gaps = np.full(count, 1.0 / rate)
    else:
        gaps = rng.gamma(cv**-2, cv**2 / rate, count)
    return np.cumsum(gaps)


def private_layers(layers: int, common_share: float) -> int:
    """How many last layers a fine-tune has of its own when `common_share` of them are common.

    Raises:
      ValueError: the share is not between 0 and 1.
    """
    if not 0 <= common_share <= 1:
        raise ValueError(f"common_share is {common_share}; give 0 to 1")
    return round(layers * (1 - common_share))


def generate(
    *,
    models: Sequence[str],
    count: int,
    lengths: Lengths,
    vocab_size: int,
    seed: int,
    popularity: np.ndarray | None = None,
    rate: float = 0.0,
    cv: float = 1.0,
) -> list[Arrival]:
    """`count` arrivals in order of time; with rate 0 a backlog, all due at time 0.

    Args:
      models: chain names, most popular first where popularity says so.
      count: requests.
      lengths: of prompts and answers.
      vocab_size: prompts are random ids below it.
      seed: the same seed gives the same workload.
      popularity: probability of each model; None takes them in turn, which is exactly uniform.
      rate: requests a second.
      cv: coefficient of variation of the gaps between arrivals.
    """
    rng = np.random.default_rng(seed)
    times = gamma_arrivals(rng, count, rate, cv) if rate else np.zeros(count)
    if popularity is None:
        chosen = np.arange(count) % len(models)
    else:
        chosen = rng.choice(len(models), count, p=popularity)
    prompts, outputs = lengths.draw(rng, count)
    return [
        Arrival(
            time=float(times[i]),
            model=models[chosen[i]],
            prompt=tuple(rng.integers(0, vocab_size, prompts[i]).tolist()),
            max_tokens=int(outputs[i]),
        )
        for i in range(count)
    ]


def top_share(arrivals: Sequence[Arrival], top: int) -> float:
    """Share of the requests that go to the `top` models which got most."""
    if not arrivals:
        raise ValueError("there are no arrivals to take a share of")
    counts: dict[str, int] = {}
    for arrival in arrivals:
        counts[arrival.model] = counts.get(arrival.model, 0) + 1
    return sum(sorted(counts.values(), reverse=True)[:top]) / len(arrivals)


def describe(arrivals: Sequence[Arrival]) -> dict[str, float]:
    """What was realised: requests, models, top-1 and top-10 share, mean lengths."""
    mean: Callable[[list[int]], float] = lambda values: round(float(np.mean(values)), 1)
    return {
        "requests": len(arrivals),
        "models": len({a.model for a in arrivals}),
        "top1_share": round(top_share(arrivals, 1), 4),
        "top10_share": round(top_share(arrivals, 10), 4),
        "mean_prompt_tokens": mean([len(a.prompt) for a in arrivals]),
        "mean_output_tokens": mean([a.max_tokens for a in arrivals]),
    }
