"""Programs built ahead: a server finds all of them, and trusts none that is not exactly its own."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import pytest
from harness import collect_tokens, oracle, request

from jblock.engine.config import EngineConfig
from jblock.engine.engine import ThreadEngine
from jblock.engine.programs import executable_cache
from jblock.engine.programs.executable_cache import ExecutableCache
from jblock.parallel.targets import Target
from jblock.tools.prebuild import Report, prebuild
from jblock.zoo.store import Zoo

ROOT = Path(__file__).parent.parent.parent
MODELS = ("qwen3_qknorm", "qwen3_lora_all_r8")
CONFIG = EngineConfig(
    max_num_seqs=4,
    max_model_len=160,
    page_size=16,
    decode_sizes=(4,),
    prefill_grids=((1, 16),),
    kv_memory_mb=1,
    adapter_slots=2,
)


def build(zoo: Path, folder: Path, target: str = "cpu") -> Report:
    """What `jblock-compile` does."""
    store = Zoo.open(zoo)
    chains = {name: store.chain(name) for name in MODELS}
    return prebuild(store, chains, CONFIG, Target.parse(target), folder)


def served(zoo: Path, folder: Path) -> int:
    """Serves the models on what is in a folder; returns how many programs had to be compiled."""
    store = Zoo.open(zoo)
    chains = {name: store.chain(name) for name in MODELS}
    engine = ThreadEngine(store, chains, CONFIG, ExecutableCache(folder))
    try:
        engine.wait_until_warm()
        for name in MODELS:
            engine.submit(request(name, name, oracle(name)["prompt"]))
        for name, tokens in collect_tokens(engine, MODELS).items():
            assert tokens == oracle(name)["greedy"].tolist()
        stats = engine.stats()
        assert stats.compiles_on_serving_path == 0
        return stats.compiles_in_background
    finally:
        engine.close()


@pytest.fixture(scope="module")
def built(zoo, tmp_path_factory) -> tuple[Path, Report]:
    """A cache built ahead."""
    folder = tmp_path_factory.mktemp("prebuilt") / "executables"
    return folder, build(zoo, folder)


def test_a_server_compiles_nothing_and_a_second_build_neither(zoo, built):
    folder, report = built
    assert report.compiled == report.programs == len(list(folder.glob("*.xla")))
    assert served(zoo, folder) == 0
    assert build(zoo, folder).compiled == 0


def test_the_report_says_what_it_takes(built):
    _, report = built
    assert report.fits and report.target == "cpu"
    assert report.weight_bytes > 0 and report.table_bytes > 0 and report.workspace_bytes > 0
    pages = 4 * 10
    assert report.kv_bytes <= CONFIG.kv_memory_mb * 10**6 * (pages + 1) / pages
    (estimate,) = report.estimates
    assert estimate.batch == 4 and estimate.context == 80 and estimate.link_bytes == 0
    # All weights but the rows of the embedding that nobody asks for.
    assert 0 < estimate.weight_bytes < report.weight_bytes
    assert estimate.seconds >= 0.999 * (estimate.weight_bytes + estimate.kv_bytes) / 40e9


def test_what_is_not_whole_or_not_its_own_is_rebuilt(zoo, built, tmp_path):
    folder = tmp_path / "copied"
    folder.mkdir(mode=0o700)
    for path in built[0].glob("*.xla"):
        (folder / path.name).write_bytes(path.read_bytes())
    entries = sorted(folder.glob("*.xla"))
    # Cut short, a bit flipped, another program under its name, and what is no program at all.
    entries[0].write_bytes(entries[0].read_bytes()[:100])
    flipped = bytearray(entries[1].read_bytes())
    flipped[-1] ^= 1
    entries[1].write_bytes(flipped)
    entries[2].write_bytes(entries[3].read_bytes())
    entries[4].write_bytes(executable_cache._seal(entries[4], b"no pickle") + b"no pickle")
    assert served(zoo, folder) == 4
    assert served(zoo, folder) == 0


@pytest.mark.parametrize("what", ["code", "jax"])
def test_what_other_versions_built_is_stale(tmp_path, monkeypatch, what):
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2,), "float32")).compile()
    cache = ExecutableCache(tmp_path)
    cache.store("program", program)
    executable_cache.environment.cache_clear()
    if what == "code":
        monkeypatch.setattr(executable_cache, "_CODE_DIGEST", "other")
    else:
        monkeypatch.setattr(executable_cache.jax, "__version__", "0.0.1")
    try:
        other = ExecutableCache(tmp_path)
        assert other.load("program") is None
        other.store("program", program)
        assert len(list(tmp_path.glob("*.xla"))) == 2
    finally:
        executable_cache.environment.cache_clear()
    assert cache.load("program") is not None and other.load("program") is not None


def test_accelerators_are_told_apart_by_their_compilers(monkeypatch):
    class Chip:
        platform, device_kind = "tpu", "TPU v5 lite"

    versions = {"libtpu": "0.0.1"}
    monkeypatch.setattr(executable_cache, "_version", lambda name: versions.get(name, "-"))
    texts = set()
    for version, count, kind in (
        ("0.0.1", 1, "TPU v5 lite"),
        ("0.0.2", 1, "TPU v5 lite"),
        ("0.0.2", 4, "TPU v5 lite"),
        ("0.0.2", 4, "TPU v6 lite"),
    ):
        versions["libtpu"] = version
        chip = type("C", (Chip,), {"device_kind": kind})()
        executable_cache.environment.cache_clear()
        texts.add(executable_cache.environment((chip,) * count))
    executable_cache.environment.cache_clear()
    assert len(texts) == 4
    # The CPU of the host that builds is no part of it.
    monkeypatch.setattr(executable_cache, "_cpu_features", lambda: "another CPU")
    assert executable_cache.environment((chip,) * 4) in texts
    executable_cache.environment.cache_clear()


@pytest.mark.parametrize(
    "target, package",
    [
        ("tpu:v5e:1x1", "libtpu"),
        pytest.param("cuda:h200", "jax-cuda13-plugin", marks=pytest.mark.long),
    ],
)
def test_builds_for_a_target_that_is_not_here(zoo, tmp_path, target, package):
    if executable_cache._version(package) == "-":
        reason = f"NOT RUN: building for {target} needs {package} (the extra `compile`)"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    folder = tmp_path / "executables"
    done = subprocess.run(
        [sys.executable, __file__, str(zoo), str(folder), target],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) == len(list(folder.glob("*.xla"))) > 0
    # Foreign to this CPU: nothing of it is even looked at.
    cache = ExecutableCache(folder)
    assert not any(cache._path(path.stem).exists() for path in folder.glob("*.xla"))


if __name__ == "__main__":  # A process of its own: a compiler of another platform stays in it.
    print(build(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]).compiled)
