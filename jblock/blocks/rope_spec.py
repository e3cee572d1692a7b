"""What a rotary position embedding is made of. Plain data, like every spec."""

import dataclasses

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


class SpecError(ValueError):
    """A spec that cannot be served: names the field, the value and the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding (arXiv 2104.09864), half-split layout as in Hugging Face Llama unless
    interleaved.

    Attributes:
      kind: how the wavelengths are stretched: "default" not at all, "linear" all by `factor`,
        "llama3" in the frequency bands of Llama 3.1, "yarn" as in arXiv 2309.00071, "longrope" each
        by its own factor as in arXiv 2402.13753.
      theta: base of the geometric sequence of wavelengths.
      dim: leading dimensions of a head that are rotated; 0 rotates all of them.
      factor: linear, llama3, yarn: how much the long wavelengths are stretched.
      low_freq_factor: llama3: wavelengths over original_max_position / this are fully stretched.
      high_freq_factor: llama3: wavelengths under original_max_position / this are left alone.
      original_max_position: llama3, yarn: context length in tokens the model was first trained on.
      beta_fast: yarn: dimensions that turn this often in the first context are left alone.
      beta_slow: yarn: dimensions that turn less often than this are fully stretched.
      truncate: yarn: whether the two bounds above are rounded outwards to whole dimensions.
      attention_factor: cosines and sines are multiplied by it.
      factors: longrope: the stretch of each wavelength.
      interleaved: each even dimension pairs with the odd one behind it (GLM, Cohere), instead of the
        first half of the rotated dimensions with their second half.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0
    dim: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()
    interleaved: bool = False

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise SpecError(f"rope kind {self.kind!r} is not known; known: {', '.join(ROPE_KINDS)}")
        if self.dim % 2:
            raise SpecError(f"rope over {self.dim} dimensions: give an even number")

    def rotated(self, head_dim: int) -> int:
        """How many leading dimensions of a head are rotated.

        Raises:
          SpecError: more than there are, an odd number, or another number than factors are given for.
        """
        dim = self.dim or head_dim
        if dim > head_dim or dim % 2:
            raise SpecError(
                f"rope over {dim} of a head's {head_dim} dimensions: give an even number of them"
            )
        if self.kind == "longrope" and len(self.factors) != dim // 2:
            raise SpecError(
                f"longrope has {len(self.factors)} factors, {dim} rotated dimensions need {dim // 2}"
            )
        return dim
