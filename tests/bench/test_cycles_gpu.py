"""What ptxas says is read as it says it."""

import pytest

from bench import cycles_gpu

SAID = """
bench.cycles_gpu: ["attention", {"shared_memory": 1024, "barrier_ops": 256}]
ptxas warning : Registers are spilled in function 'f', 48 bytes spill stores, 84 bytes spill loads
ptxas info    : Function properties for f
    48 bytes stack frame, 48 bytes spill stores, 84 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 48 bytes cumulative stack size, 1 bytes smem
ptxas info    : Function properties for g
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
bench.cycles_gpu: ["matmul", {}]
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 96 registers, used 2 barriers
"""


def test_a_spill_is_counted_once_and_a_warning_is_one():
    assert cycles_gpu.parse(SAID) == {
        "attention": {
            "registers": 168,
            "spills": 48,
            "warnings": 1,
            "shared_memory": 1024,
            "barrier_ops": 256,
        },
        "matmul": {"registers": 96, "spills": 0, "warnings": 0},
    }


def test_a_silent_ptxas_is_no_good_news():
    with pytest.raises(ValueError, match="nothing of 'attention'"):
        cycles_gpu.parse('bench.cycles_gpu: ["attention", {}]\n')
