"""A base and an adapter of the demo family, for agents with real engines."""

from pathlib import Path

import pytest
from demo_agents import ADAPTER, BASE

from checkpoints import hf, peft
from checkpoints.progress import Progress

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def kwargs(tmp_path_factory) -> dict:
    """Of an engine for a base and an adapter on it."""
    folder, quiet = tmp_path_factory.mktemp("pipeline"), Progress(False)
    hf.convert(ROOT / "examples/models" / BASE, folder / "zoo", BASE, quiet)
    peft.convert(ROOT / "examples/adapters" / ADAPTER, folder / "zoo", BASE, ADAPTER, quiet)
    return {
        "zoo": str(folder / "zoo"),
        "models": [BASE, ADAPTER],
        "executable_cache": str(folder / "programs"),
        "max_num_seqs": 8,
        "max_model_len": 128,
        "page_size": 16,
        "decode_sizes": [8],
        "prefill_grids": [[8, 16]],
        "kv_memory_mb": 16,
    }
