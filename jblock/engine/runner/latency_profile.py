"""How long every program takes on every grid, measured and kept for the next start, which measures again
while it is idle."""

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from jblock.engine.config import Bucket
from jblock.engine.graph.graph import BlockInstance, Layer, Route
from jblock.engine.kv_cache.sequence_pages import Boundary
from jblock.engine.programs.executable_cache import environment
from jblock.engine.programs.keys import ProgramKey
from jblock.engine.runner.runner import Runner
from jblock.engine.scheduling.machine import Machine
from jblock.engine.scheduling.step_budget import Times

# The least of a few: whatever else the machine does can only make a call slower.
_REPEATS = 3


class Pace:
    """How much longer steps take than their profile says: cached tokens to attend to, other work on
    the machine, and calls that are cheaper together.

    Attributes:
      ratio: seconds passed over seconds expected, lately.
    """

    _SLOWEST, _FASTEST = 8.0, 0.25
    _WEIGHT = 0.1

    def __init__(self) -> None:
        self.ratio = 1.0
        self._ready: float | None = None

    def note(self, enqueued: float, expected: float, sampled: bool) -> None:
        """Learns from a step whose tokens were read a moment ago.

        Args:
          enqueued: clock when it began to be enqueued.
          expected: seconds it should take by the profile; 0 if not known.
          sampled: it had tokens to read.
        """
        now = time.perf_counter()
        if sampled and expected and self._ready is not None:
            # Steps follow each other on the device, so one takes from the last one's end to its own.
            seconds = now - max(self._ready, enqueued)
            ratio = min(max(seconds / expected, self._FASTEST), self._SLOWEST)
            self.ratio += self._WEIGHT * (ratio - self.ratio)
        # A step without tokens ends unnoticed, and the next one bears its time.
        self._ready = now if sampled else None


class Profile:
    """Seconds of a program by grid, for the blocks of one agent.

    What is measured is one layer (an embedding, a layer, a head with the greedy sampler) on rows that do
    not exist and the null page. A block takes the sum of its layers; attention over cached tokens and
    what else the machine does are not in it (the loop learns how much slower real steps are).

    Attributes:
      version: changes with every time that becomes known, and with what is to be timed.
    """

    def __init__(self, device: Runner):
        """Takes what earlier starts measured from beside the compiled programs."""
        cache = device.executables.cache
        self._device, self.version = device, 0
        self._path = _path(cache.folder) if cache else None
        self._seconds: dict[str, float] = _read(self._path) if self._path else {}
        # Of these nothing is known about the machine when they were measured: it may have been busy.
        self._kept = set(self._seconds)
        self._tries: dict[str, list[float]] = {}
        self._todo: list[tuple[str, list[Layer], Bucket]] | None = None
        self._again: list[tuple[str, list[Layer], Bucket]] = []
        self._scope: tuple = ()
        self._memo: dict[tuple[int, Bucket], float | None] = {}
        self._token_memo: dict[tuple[BlockInstance, ...], float | None] = {}
        self._covers: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self._covered: tuple[Bucket, ...] = ()
        self._names: dict[ProgramKey, str] = {}
        self._machine: tuple[Any, Any] = None, None

    def prepare(self, instances: Sequence[BlockInstance]) -> None:
        """Looks for what is not measured yet of these blocks on the grids there are."""
        scope = (tuple(map(id, instances)), self._device.buckets)
        if scope == self._scope:
            return
        self._scope = scope
        self._forget_sums()
        missing: dict[str, tuple[str, list[Layer], Bucket]] = {}
        kept: dict[str, tuple[str, list[Layer], Bucket]] = {}
        for instance in instances:
            for layer in instance.layers:
                for bucket in self._device.buckets:
                    name = self._name(layer, bucket)
                    if name in self._seconds and name not in self._kept:
                        continue
                    found = kept if name in self._kept else missing
                    found.setdefault(name, (name, [], bucket))[1].append(layer)
        self._todo, self._again = list(missing.values()), list(kept.values())

    @property
    def complete(self) -> bool:
        """Whether all that was last prepared has been measured."""
        return not self._todo

    def measure_one(self) -> None:
        """Times one call of a program that is not measured yet, on an idle device; blocks until it is
        done."""
        if not self._todo:
            return
        name, layers, bucket = self._todo[-1]
        tries = self._tries.setdefault(name, [])
        seconds = self._time(layers, bucket, len(tries))
        if seconds is None:  # Until such blocks run, the policy does without.
            self._todo.pop()
            return
        tries.append(seconds)
        if len(tries) == _REPEATS:
            self._seconds[name] = min(self._tries.pop(name))
            self._todo.pop()
            self._forget_sums()
            if not self._todo and self._path:
                _write(self._path, self._seconds)

    def measure_again(self) -> bool:
        """Times one call that an earlier start measured, once more, on an idle device; the least holds.
        Blocks until it is done; False: each has been, as far as its weights are there."""
        while self._again:
            name, layers, bucket = self._again.pop()
            seconds = self._time(layers, bucket, 0)
            if seconds is None:
                continue
            self._kept.discard(name)
            if seconds < self._seconds[name]:
                self._seconds[name] = seconds
                self._forget_sums()
            if not self._again and self._path:
                _write(self._path, self._seconds)
            return True
        return False

    def _time(self, layers: Sequence[Layer], bucket: Bucket, turn: int) -> float | None:
        """Seconds of one call; None where no layer has its weights."""
        layers = [layer for layer in layers if all(layer.params)]
        # Layers of one form in turn, so that no call finds its weights in the CPU's cache.
        return self._device.time_layer(layers[turn % len(layers)], bucket) if layers else None

    def forget(self) -> None:
        """Call it when other blocks are served."""
        self._scope = ()
        self._forget_sums()

    def _forget_sums(self) -> None:
        """What was worked out of the times."""
        self._memo, self._covers, self._token_memo = {}, {}, {}
        self.version += 1

    def layer_seconds(self, layer: Layer, bucket: Bucket) -> float | None:
        """Seconds of one layer on one grid; None as long as it is not measured."""
        return self._seconds.get(self._name(layer, bucket))

    def block_seconds(self, instance: BlockInstance, bucket: Bucket) -> float | None:
        """Seconds of a block on one grid; as long as it is not measured, estimated from the nearest
        grid that is; None as long as none is."""
        key = (id(instance), bucket)
        if key not in self._memo:
            self._memo[key] = self._block_seconds(instance, bucket)
        return self._memo[key]

    def _block_seconds(self, instance: BlockInstance, bucket: Bucket) -> float | None:
        if self._measured(instance, bucket) is not None:
            # No grid takes longer than one of more sequences: where it seems to, something else ran.
            larger = (
                self._measured(instance, b)
                for b in self._device.buckets
                if b.q_len == bucket.q_len and b.num_seqs >= bucket.num_seqs
            )
            return min(seconds for seconds in larger if seconds is not None)
        rows = bucket.num_seqs * bucket.q_len
        others = sorted(
            (b for b in self._device.buckets if (b.q_len > 1) == (bucket.q_len > 1)),
            key=lambda b: abs(b.num_seqs * b.q_len - rows),
        )
        for other in others:
            known = self._measured(instance, other)
            if known is not None:
                return known * max(rows / (other.num_seqs * other.q_len), 1.0)
        return None

    def _measured(self, instance: BlockInstance, bucket: Bucket) -> float | None:
        parts = [self._seconds.get(self._name(u, bucket)) for u in instance.layers]
        known = [p for p in parts if p is not None]
        return sum(known) if len(known) == len(parts) else None

    def decode_times(self, instance: BlockInstance) -> Times | None:
        """A block's decoding times; None as long as no grid is measured."""
        return self._times(instance, 1)

    def cover(self, instance: BlockInstance, chunk: int, count: int) -> tuple[int, ...]:
        """Batch sizes of the calls that take `count` chunks of a length through a block in the least time;
        as long as nothing is measured, in the fewest calls."""
        if self._device.buckets is not self._covered:
            self._covered, self._covers = self._device.buckets, {}
        key = (id(instance), chunk, count)
        if key not in self._covers:
            times = self._times(instance, chunk)
            if times is None:
                sizes = [b.num_seqs for b in self._device.buckets if b.q_len == chunk]
                times = Times(tuple(sorted(sizes)), (1.0,) * len(sizes))
            self._covers[key] = times.cover(count)
        return self._covers[key]

    def _times(self, instance: BlockInstance, chunk: int) -> Times | None:
        sizes: list[int] = []
        seconds: list[float] = []
        for bucket in sorted(b for b in self._device.buckets if b.q_len == chunk):
            known = self.block_seconds(instance, bucket)
            if known is not None:
                sizes.append(bucket.num_seqs)
                seconds.append(max([known, 1e-9, *seconds]))
        return Times(tuple(sizes), tuple(seconds)) if sizes else None

    def machine(self) -> Machine:
        """The device as the scheduler sees it now."""

        def chunk_seconds(route: Route, chunk: int, entry: Boundary | None) -> float | None:
            at, layer = (entry.stage, entry.layer) if entry else (0, 0)
            return self.chunk_seconds(route.instances[at:], chunk, layer)

        device = self._device
        now = device.greedy_only, device.rates, device.buckets
        if now != self._machine[0]:
            machine = Machine(
                greedy_only=device.greedy_only,
                rates=device.rates,
                chunks=sorted({b.q_len for b in device.buckets if b.q_len > 1}),
                chunk_seconds=chunk_seconds,
                token_seconds=lambda route: self.token_seconds(route.instances),
            )
            self._machine = now, machine
        return self._machine[1]

    def chunk_seconds(
        self, instances: Sequence[BlockInstance], chunk: int, layer: int = 0
    ) -> float | None:
        """Seconds of one chunk of a prompt through these blocks by itself, from a layer of the first one on;
        None if not measured."""
        total = 0.0
        for instance in instances:
            known = self.block_seconds(instance, self._smallest(chunk))
            if known is None:
                return None
            total += known * (1 - layer / max(len(instance.layers), 1))
            layer = 0
        return total

    def token_seconds(self, instances: Sequence[BlockInstance]) -> float | None:
        """Seconds of one decoded token along these blocks: its part of the smallest batch that is nearly as
        good as the best; None if not measured."""
        key = tuple(instances)
        if key not in self._token_memo:
            self._token_memo[key] = self._token_seconds(key)
        return self._token_memo[key]

    def _token_seconds(self, instances: Sequence[BlockInstance]) -> float | None:
        total = 0.0
        for instance in instances:
            times = self.decode_times(instance)
            if times is None:
                return None
            total += times.of(times.efficient) / times.efficient
        return total

    def _smallest(self, chunk: int) -> Bucket:
        return min(b for b in self._device.buckets if b.q_len == chunk)

    def _name(self, layer: Layer, bucket: Bucket) -> str:
        key = self._device.layer_key(layer, bucket)
        if key not in self._names:
            self._names[key] = self._long_name(key)
        return self._names[key]

    def _long_name(self, key: ProgramKey) -> str:
        # Its time does not depend on how many pages there are.
        pool = dataclasses.replace(key.pool, num_pages=0) if key.pool else None
        text = f"{dataclasses.replace(key, pool=pool)!r} {self._device.executables.geometry!r}"
        return f"{key.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _path(folder: Path) -> Path:
    digest = hashlib.sha256(environment().encode()).hexdigest()[:16]
    return folder / f"profile-{digest}.json"


def _read(path: Path) -> dict[str, float]:
    """What a file holds; nothing where it is missing or damaged, for it can be measured again."""
    try:
        data = json.loads(path.read_text())
        if not all(isinstance(v, float) and v > 0 for v in data.values()):
            raise ValueError("a time is not a positive number")
        return data
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as e:
        logging.warning("profile %s cannot be used (%s); it is measured again", path.name, e)
        return {}


def _write(path: Path, seconds: dict[str, float]) -> None:
    """Adds to a file what was measured. A full disk costs the file, never the service."""
    try:
        text = json.dumps(_read(path) | seconds, indent=0, sort_keys=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix="tmp-")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as e:
        logging.warning("profile %s could not be kept for the next start: %s", path.name, e)
