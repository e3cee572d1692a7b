"""Block sizes measured on a device are kept and used; others are the heuristic's, said once."""

import dataclasses

from jblock.pallas_kernels.tuning import Tuning


@dataclasses.dataclass(frozen=True)
class Blocks:
    size: int


@dataclasses.dataclass(frozen=True)
class Shape:
    rows: int

    @property
    def key(self) -> str:
        return f"rows {self.rows}"


def test_tuned_blocks_are_used_and_untuned_shapes_are_said_once(tmp_path, caplog):
    tuning = Tuning("some_op", Blocks, lambda shape: Blocks(shape.rows))
    assert tuning.folder.parts[-2:] == ("some_op", "tuned")
    tuning.folder = tmp_path
    assert tuning.save("TPU v9", {Shape(4): (Blocks(128), 1e-3)}).name == "tpu_v9.json"
    tuning.save("TPU v9", {Shape(5): (Blocks(256), 2e-3)})
    assert tuning.blocks_for(Shape(4), "TPU v9") == Blocks(128)
    assert tuning.blocks_for(Shape(5), "TPU v9") == Blocks(256)
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert tuning.blocks_for(Shape(6), "TPU v9") == Blocks(6)
    (said,) = caplog.records
    assert said.message.startswith("some op rows 6 is not tuned for TPU v9")
