"""Other sizes for the pools of pages, while sequences hold some of them."""

from jblock.engine.kv_cache.spec import PageShape
from jblock.engine.programs.needed import Pools
from jblock.engine.runner.runner import Runner
from jblock.engine.scheduling import fairness
from jblock.engine.scheduling.scheduler import Scheduler


def resize_pools(device: Runner, sequences: Scheduler, pools: Pools) -> None:
    """Gives pools other sizes, adds those that are new, and removes those that no request needs. Where a
    smaller pool does not hold the pages of running sequences, the youngest are preempted."""
    state, kv = device.state, sequences.kv
    for shape in [s for s in state.pool_shapes if s not in pools]:
        if not any(sequence.pages.uses(shape) for sequence in sequences):
            kv.remove(shape)
            state.remove_pool(shape)
    sizes = {shape: pool.num_pages for shape, pool in state.pool_shapes.items()}
    for shape, pool in sorted(pools.items(), key=lambda p: p[1].num_pages - sizes.get(p[0], 0)):
        if state.pool_shapes.get(shape) == pool:
            continue
        _free_pages(sequences, shape, pool.num_pages - 1)
        moves = kv.resize(shape, pool)
        if shape in state.pool_shapes:
            state.resize_pool(shape, pool, moves)
        else:
            state.add_pool(shape, pool)
    device.forget_calls()


def _free_pages(sequences: Scheduler, shape: PageShape, count: int) -> None:
    """Preempts sequences until a pool would do with so many pages."""
    pool = sequences.kv.pools.get(shape)
    while pool is not None and pool.total - pool.num_free > count:
        rivals = [s for s in sequences.running.values() if s.pages.uses(shape)]
        sequences.preempt(fairness.most_served(sequences.counter, rivals))
