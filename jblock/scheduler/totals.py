"""The statistics of several agents as those of one engine."""

import dataclasses
from collections.abc import Sequence

from jblock.engine import api


def total(several: Sequence[api.EngineStats]) -> api.EngineStats:
    """Counters and gauges of engines that serve one zoo together. What all have alike is not added up."""
    alike = ("chains", "kernels_replaced")
    tenants: dict[str, api.TenantStats] = {}
    for one in (tenant for stats in several for tenant in stats.tenants):
        so_far = tenants.get(one.tenant, api.TenantStats(tenant=one.tenant))
        tenants[one.tenant] = api.TenantStats(
            tenant=one.tenant,
            waiting=so_far.waiting + one.waiting,
            running=so_far.running + one.running,
            served_seconds=so_far.served_seconds + one.served_seconds,
        )
    numbers = {
        f.name: (max if f.name in alike else sum)(getattr(s, f.name) for s in several)
        for f in dataclasses.fields(api.EngineStats)
        if f.name != "tenants"
    }
    return api.EngineStats(**numbers, tenants=tuple(tenants.values()))
