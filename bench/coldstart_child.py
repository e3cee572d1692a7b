"""One cold start: opens a zoo on disk, answers one request, waits for every program, prints its times.

Run by the scenario `coldstart` as `python -m bench.coldstart_child ZOO CACHE DTYPE BEGIN SIZE`.
"""

import json
import os
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")


def main(zoo: str, cache: str, dtype: str, begin: float, quick: bool) -> None:
    """Prints one JSON line: seconds since `begin` (a clock of the parent, which started us then)."""
    from jblock.engine.api import Request, SamplingParams
    from jblock.engine.factory import build_engine
    from jblock.zoo.store import Zoo

    reading = 0.0
    load = Zoo.load_component

    def timed_load(self, *args, **kwargs):
        nonlocal reading
        before = time.perf_counter()
        tensors = load(self, *args, **kwargs)
        reading += time.perf_counter() - before
        return tensors

    Zoo.load_component = timed_load
    imported = time.time() - begin
    settings = {"decode_sizes": (1, 4), "prefill_grids": ((1, 16),)} if quick else {}
    engine = build_engine(zoo=zoo, executable_cache=cache, dtype=dtype, **settings)
    engine.submit(
        Request(
            request_id="first",
            model="base",
            token_ids=tuple(range(1, 17)),
            sampling=SamplingParams(max_tokens=1, ignore_eos=True),
        )
    )
    while not any(output.token_ids for output in engine.poll(1.0)):
        pass
    first_token = time.time() - begin
    engine.wait_until_warm()
    settled = time.time() - begin
    stats = engine.stats()
    engine.close()
    print(
        json.dumps(
            {
                "imported_s": imported,
                "reading_s": reading,
                "first_token_s": first_token,
                "settled_s": settled,
                "programs": stats.compiles_in_background,
                "compiles_on_serving_path": stats.compiles_on_serving_path,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], float(sys.argv[4]), sys.argv[5] == "quick")
