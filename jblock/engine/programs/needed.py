"""Which programs some models need."""

from collections.abc import Iterator, Mapping, Sequence

from jblock.blocks.spec import ComponentSpec
from jblock.engine.adapters.slot_layout import written_tables
from jblock.engine.adapters.slot_tables import WRITE_SIZES
from jblock.engine.config import Bucket, EngineConfig
from jblock.engine.graph.graph import Layer, ServingGraph
from jblock.engine.kv_cache.spec import PageShape, Pool, RowPool
from jblock.engine.programs import row_moves
from jblock.engine.programs.keys import WRITING, ProgramKey, vocab_size
from jblock.engine.signature import Signature, TableForm

Pools = Mapping[PageShape, Pool]


def program_keys(
    graph: ServingGraph,
    buckets: Sequence[Bucket],
    pools: Pools,
    config: EngineConfig,
    *,
    greedy_only: bool = False,
) -> Iterator[ProgramKey]:
    """Every program a graph can ask for on these grids, with these pools; with `greedy_only`, for greedy
    requests that want nothing else."""
    layers = [layer for i in graph.instances for layer in i.layers]
    vocabs = {vocab_size(u.signature) for u in layers if u.signature.kind == "head"}
    kinds = (
        ("greedy",) if greedy_only else ("greedy", "sampled", "adjust", "constrain", "top_logprobs")
    )
    for bucket in buckets:
        for layer in layers:
            yield layer_key((layer,), bucket, pools)
            if layer.signature.kind == "head" and bucket.q_len > 1 and not greedy_only:
                yield scoring_key(layer, bucket)
                yield pooling_key(layer, bucket)
        for vocab in vocabs:
            size = Bucket(bucket.num_seqs, 1)
            for kind in kinds:
                yield ProgramKey(kind=kind, bucket=size, vocab_size=vocab)
    if not greedy_only:
        for vocab in vocabs:
            yield ProgramKey(kind="set_counts", vocab_size=vocab)
    if graph.has_hops:
        most = row_moves.size_for(
            max(b.num_seqs * b.q_len for b in (*config.decode_buckets, *config.prefill_buckets))
        )
        for width in graph.widths:
            for size in (size for size in row_moves.SIZES if size <= most):
                yield moving_key("take_rows", width, size)
                yield moving_key("put_rows", width, size)
    for pool in pools.values():
        if isinstance(pool, RowPool):
            for bucket in buckets:
                if bucket.q_len > 1:
                    yield ProgramKey(kind="read_rows", bucket=bucket, pool=pool)
                    yield ProgramKey(kind="write_rows", bucket=bucket, pool=pool)
            continue
        yield ProgramKey(kind="zero_pages", pool=pool)
        if config.host_kv_memory_mb:
            yield ProgramKey(kind="gather_pages", pool=pool)
            yield ProgramKey(kind="scatter_pages", pool=pool)
    for signature in {u.signature for u in layers}:
        for spec, form in zip(signature.specs, signature.forms, strict=True):
            if form is None:
                continue
            for kind in WRITING:
                if written_tables(kind, spec, form):
                    for count in WRITE_SIZES if kind == "write_pieces" else (1,):
                        yield writing_key(kind, spec, form, count)


def segment_keys(graph: ServingGraph, pools: Pools, config: EngineConfig) -> Iterator[ProgramKey]:
    """Programs that run several layers, or a head and the picking of the best tokens, in one call: a tier
    that saves time but that nothing waits for. Decoding only; a chunk of prefill is long enough to hide what
    a call costs."""
    for instance in graph.instances:
        for segment in instance.segments:
            if len(segment.layers) > 1:
                for bucket in config.decode_buckets:
                    yield layer_key(segment.layers, bucket, pools)
    for head in (layer for i in graph.instances if i.is_head for layer in i.layers):
        for bucket in config.decode_buckets:
            yield greedy_head_key(head, bucket)


def resize_keys(old: Pools, new: Pools) -> Iterator[ProgramKey]:
    """What takes pages from pools of some sizes to those of others, by way of the host."""
    for shape in old.keys() & new.keys():
        if old[shape] != new[shape]:
            yield ProgramKey(kind="gather_pages", pool=old[shape])
            yield ProgramKey(kind="scatter_pages", pool=new[shape])


def layer_key(layers: Sequence[Layer], bucket: Bucket, pools: Pools) -> ProgramKey:
    """The program that runs some layers on a grid."""
    shape = next((layer.kv_shape for layer in layers if layer.kv_shape), None)
    return ProgramKey(
        kind=layers[0].signature.kind,
        bucket=bucket,
        signatures=tuple(layer.signature for layer in layers),
        pool=pools[shape] if shape else None,
    )


def scoring_key(layer: Layer, bucket: Bucket) -> ProgramKey:
    """The program that scores the prompts that go through a head."""
    return ProgramKey(kind="prompt_logprobs", bucket=bucket, signatures=(layer.signature,))


def pooling_key(layer: Layer, bucket: Bucket) -> ProgramKey:
    """The program that sums up the hidden rows that go through a head."""
    return ProgramKey(kind="pooling", bucket=bucket, signatures=(layer.signature,))


def greedy_head_key(layer: Layer, bucket: Bucket) -> ProgramKey:
    """The program that runs a head and picks the best tokens."""
    return ProgramKey(kind="greedy_head", bucket=bucket, signatures=(layer.signature,))


def moving_key(kind: str, width: int, size: int) -> ProgramKey:
    """The program that takes so many rows out of registers, or puts them in."""
    return ProgramKey(kind=kind, bucket=Bucket(size, 1), width=width)


def writing_key(kind: str, spec: ComponentSpec, form: TableForm, count: int) -> ProgramKey:
    """The program that writes so many pieces, a slot's vectors, or a place's codes to tables."""
    signature = Signature(specs=(spec,), forms=(form,), dtype="float32")
    return ProgramKey(kind=kind, bucket=Bucket(count, 1), signatures=(signature,))
