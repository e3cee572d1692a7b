"""What libtpu's final schedule of a program says: its bundles, as a tree of loops and branches.

A bundle is what a TPU core issues in a cycle, if nothing stalls it; so bundles that are executed are a
lower bound of cycles. The compiler writes the schedule as text when asked to (`dumping`), each bundle
with the depth of the loops around it, and branches by the region that they skip.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s*(LB|LH|LE|PB|PF|CT)?\s*:\s*(>*)\s*\{(.*)")
_BRANCH = re.compile(r"sbr\.rel \((!?)%[\w.]+\) target = \$region(\d+)")
_REGION = re.compile(r"(?:Start|End|Start/End empty) region (\d+)")
_PRODUCT = re.compile(r"= vmatmul|= vmatmsk|vdwg|= vmxu|= vmatpush_matmul")
_SPILLED = re.compile(r"= vst\S* [^;]*_spill\]")

_MAPS = Path("/proc/self/maps")
"""What is loaded into this process."""


def dumping(folder: Path) -> None:
    """Has libtpu write the schedules of all that this process compiles from now on.

    Raises:
      RuntimeError: libtpu has been loaded already, and would not.
    """
    # jax imports the Python package at once, the library itself when it first compiles for a TPU.
    if _MAPS.exists() and "libtpu.so" in _MAPS.read_text():
        raise RuntimeError("libtpu is loaded already: ask for its schedules before it compiles")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join(
        [
            os.environ.get("LIBTPU_INIT_ARGS", ""),
            f"--xla_jf_dump_to={folder}",
            "--xla_jf_dump_llo_text=true",
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*",
        ]
    ).strip()


@dataclasses.dataclass
class Region:
    """A stretch of bundles that is executed as often as it is entered: a loop's body, what a branch skips, or
    the whole program.

    Attributes:
      kind: "program", "loop" or "branch".
      bundles: its own, without those of the regions in it.
      products: instructions for the matrix units among them.
      spills: vector registers stored for want of room among them.
      fetches: copies from HBM that they start.
      inner: the regions in it, in order.
    """

    kind: str
    begin: int
    end: int
    bundles: int = 0
    products: int = 0
    spills: int = 0
    fetches: int = 0
    inner: list["Region"] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator["Region"]:
        """It and all regions in it, in the order of their first bundles."""
        yield self
        for region in self.inner:
            yield from region.walk()

    def total(self, what: "Callable[[Region], int]" = lambda r: r.bundles) -> int:
        """The sum of what a region has over it and all in it: each bundle once."""
        return sum(map(what, self.walk()))


def parse(text: str) -> Region:
    """The tree of one program's `final_bundles` text."""
    depth: list[int] = []
    labels: list[str | None] = []
    bodies: list[str] = []
    for line in text.splitlines():
        match = _BUNDLE.match(line)
        if match:
            labels.append(match[1])
            # An empty bundle is written without its depth.
            empty = match[3].startswith("}") and not match[2] and depth
            depth.append(depth[-1] if empty else len(match[2]))
            bodies.append(match[3])
        elif bodies:
            bodies[-1] += line
    spans = sorted(
        {*_loops(labels, depth), *_branches(bodies, depth)}, key=lambda s: (s[0], -s[1], s[2])
    )
    root = Region("program", 0, len(bodies))
    stack = [root]
    owner: list[Region] = [root] * len(bodies)
    for begin, end, kind in spans:
        while stack[-1].end <= begin:
            stack.pop()
        if end > stack[-1].end:  # not nested: control flow that a tree does not tell
            continue
        region = Region(kind, begin, end)
        stack[-1].inner.append(region)
        stack.append(region)
        owner[begin:end] = [region] * (end - begin)
    for body, region in zip(bodies, owner, strict=True):
        region.bundles += 1
        region.products += len(_PRODUCT.findall(body))
        region.spills += len(_SPILLED.findall(body))
        region.fetches += body.count("= dma.hbm_to_vmem")
    return root


def _loops(labels: list[str | None], depth: list[int]) -> Iterator[tuple[int, int, str]]:
    for i, label in enumerate(labels):
        if label != "LB":
            continue
        # A bundle of the loop may hold what comes behind it, and is written with that one's depth: a loop
        # ends with its last bundle before another label at a lesser depth.
        end = i + 1
        for j in range(i + 1, len(depth)):
            if labels[j] and (depth[j] < depth[i] or (depth[j] == depth[i] and labels[j] == "LB")):
                break
            if depth[j] >= depth[i]:
                end = j + 1
        yield i, end, "loop"


def _branches(bodies: list[str], depth: list[int]) -> Iterator[tuple[int, int, str]]:
    ends: dict[str, int] = {}
    for i, body in enumerate(bodies):
        for number in _REGION.findall(body):
            ends.setdefault(number, i)
    for i, body in enumerate(bodies):
        for _, number in _BRANCH.findall(body):
            end = ends.get(number, 0)
            if end > i + 1:
                yield i + 1, end, "branch"
