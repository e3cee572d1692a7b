"""What is set up where nobody says, by platforms that need not be there."""

import itertools

import pytest

from jblock.blocks.platform import Platform
from jblock.engine import factory
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.platform_defaults import default_backend, engine_config
from jblock.pallas_kernels import backends

CPU, TPU = Platform("cpu", "cpu", True), Platform("tpu", "TPU v6 lite")
H200, A100 = Platform("gpu", "NVIDIA H200"), Platform("gpu", "NVIDIA A100-SXM4-80GB")


def test_a_cpu_is_served_as_the_config_has_it():
    assert engine_config({}, CPU) == EngineConfig(max_model_len=0)


@pytest.mark.parametrize("platform", [TPU, H200, A100])
def test_accelerators_take_bfloat16_and_larger_grids(platform):
    config, on_cpu = engine_config({}, platform), engine_config({}, CPU)
    assert (config.dtype, config.kv_dtype, config.max_model_len) == ("bfloat16", "bfloat16", 0)
    sizes = [b.num_seqs for b in config.decode_buckets]
    assert sizes[-1] == config.max_num_seqs == 256 and len(sizes) == len(set(sizes))
    largest = [max(s * q for s, q in c.prefill_grids) for c in (config, on_cpu)]
    assert largest[0] == 2048 > largest[1]
    assert set(config.first_buckets) == {Bucket(16, 1), Bucket(1, 64)}


def test_decoding_has_a_grid_of_all_sequences_whatever_they_are():
    for most in (1, 48, 300, 512):
        config = engine_config({"max_num_seqs": most}, TPU)
        assert config.decode_buckets[-1] == Bucket(most, 1)
        # No more than twice the rows there are.
        sizes = [b.num_seqs for b in config.decode_buckets]
        assert sizes[0] == 1 and all(b <= 2 * a for a, b in itertools.pairwise(sizes))


def test_what_is_given_wins():
    given = {"dtype": "float32", "decode_sizes": [2, 6], "prefill_grids": [[1, 32]]}
    config = engine_config({**given, "max_model_len": 100, "max_num_seqs": 6}, H200)
    assert (config.dtype, config.kv_dtype, config.max_model_len) == ("float32", "bfloat16", 100)
    assert config.decode_buckets == (Bucket(2, 1), Bucket(6, 1))
    assert config.prefill_buckets == (Bucket(1, 32),)
    with pytest.raises(ValueError, match="max_num_seqs"):
        engine_config({"max_num_seqs": 0}, TPU)


def test_hopper_has_its_own_kernels():
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB"):
        assert default_backend(Platform("gpu", kind), "bfloat16") == "mosaic_gpu"
        assert default_backend(Platform("gpu", kind), "int8") == "mosaic_gpu"
        assert default_backend(Platform("gpu", kind), "float32") == ""
    assert [default_backend(p, "bfloat16") for p in (CPU, TPU, A100)] == ["", "", ""]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """`build_engine` where a Hopper GPU computes, without anything that computes: what it hands on, and with
    what backend the self-test ran."""
    built = []
    monkeypatch.setattr(factory, "here", lambda: H200)
    monkeypatch.setattr(factory.Zoo, "open", lambda *args, **options: None)
    monkeypatch.setattr(factory, "served_chains", lambda *args: {})
    monkeypatch.setattr(factory, "cache_folder", lambda *args: tmp_path)
    monkeypatch.setattr(factory, "ThreadEngine", lambda *args: built.append(args[2]))
    monkeypatch.setattr(factory.cpu_matmul, "disable", lambda: None)

    def run(test=lambda: {}, **given):
        tested = []

        def self_test(kv_dtype):
            tested.append((kv_dtype, backends.backend_of("gpu")))
            return test()

        monkeypatch.setattr(factory.self_test, "run", self_test)
        with backends.serving("gpu", "xla"):  # Puts back what was before.
            factory.build_engine(zoo="", **given)
            return built.pop(), backends.backend_of("gpu"), tested

    yield run
    factory.environment.cache_clear()  # It names the backends.


def test_an_engine_is_built_so(build):
    config, backend, tested = build()
    assert (config.dtype, config.kv_dtype) == ("bfloat16", "bfloat16")
    assert backend == "mosaic_gpu" and tested == [("bfloat16", "mosaic_gpu")]
    assert build()[1:] == ("mosaic_gpu", [])  # It passed at an earlier start.
    assert build(kv_dtype="float32")[1:] == ("xla", [("float32", "xla")])
    assert build(backend="xla")[1] == "xla"


def test_kernels_whose_self_test_hangs_hold_up_one_start(build):
    class Killed(BaseException):
        pass

    def hang():
        raise Killed

    with pytest.raises(Killed):
        build(hang)
    assert build(hang)[1:] == ("xla", [])
    assert build(backend="mosaic_gpu")[1:] == ("mosaic_gpu", [("bfloat16", "mosaic_gpu")])
