"""How components are cut into layers."""

from collections.abc import Sequence

from jblock.blocks.spec import ComponentSpec, EmbeddingSpec


def layer_runs(specs: Sequence[ComponentSpec]) -> list[list[int]]:
    """Cuts a block into layers: an attention with the ffn, or the router and experts, behind it; a stitch;
    or norm with unembedding."""
    runs: list[list[int]] = []
    for i, spec in enumerate(specs):
        previous = specs[runs[-1][-1]].kind if runs else None
        joins = spec.kind == "expert" or (previous, spec.kind) in (
            ("attention", "ffn"),
            ("attention", "router"),
            ("norm", "unembedding"),
        )
        if joins:
            runs[-1].append(i)
        else:
            runs.append([i])
    if any(isinstance(specs[r[0]], EmbeddingSpec) for r in runs) and len(runs) > 1:
        raise ValueError("an embedding is a block of its own; write the partition record anew")
    return runs
