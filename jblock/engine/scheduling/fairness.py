"""Who is to be served next: the weighted Virtual Token Counter (arXiv 2401.00588).

Every tenant has a level: the service it was given, in seconds of profiled device time, over its weight. The
tenant of the lowest level goes next, so tenants that always have something waiting are served alike, by
weight, to within a bound that does not grow with time. Nothing is kept for who has nothing to do: a tenant
that comes back begins level with the least of those that wait. No device time is ever left idle for it.
"""

import dataclasses
import threading

# Tenants without anything open that are remembered.
_MAX_IDLE = 1000


@dataclasses.dataclass
class _Account:
    """What is known of one tenant.

    Attributes:
      weight: its share in proportion to those of others.
      level: seconds served over the weight, and what it was lifted by.
      served: seconds.
      waiting: how many of its sequences wait.
      running: how many run.
    """

    weight: float = 1.0
    level: float = 0.0
    served: float = 0.0
    waiting: int = 0
    running: int = 0


class VirtualTokenCounter:
    """The levels of all tenants. Thread-safe: the schedulers of several groups of devices have one."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._last = ""  # The tenant that was the last to have something waiting.
        self._lock = threading.Lock()

    def arrive(self, tenant: str, weight: float) -> None:
        """A request has come. That of a tenant with nothing waiting lifts it to the least level of those
        that have, or to that of the last one that had."""
        with self._lock:
            account = self._of(tenant)
            account.weight = weight
            if not account.waiting:
                floor = min((a.level for a in self._accounts.values() if a.waiting), default=None)
                if floor is None:
                    floor = self._of(self._last).level if self._last else 0.0
                account.level = max(account.level, floor)
            account.waiting += 1

    def start(self, tenant: str) -> None:
        """One of its sequences waits no more, and runs."""
        with self._lock:
            self._leave(tenant)
            self._of(tenant).running += 1

    def withdraw(self, tenant: str) -> None:
        """One of its sequences waits no more, and has ended."""
        with self._lock:
            self._leave(tenant)
            self._forget()

    def preempt(self, tenant: str) -> None:
        """One of its sequences runs no more, and waits again. It was there all along: nothing is lifted."""
        with self._lock:
            account = self._of(tenant)
            account.running -= 1
            account.waiting += 1

    def end(self, tenant: str) -> None:
        """One of its sequences runs no more, and has ended."""
        with self._lock:
            self._of(tenant).running -= 1
            self._forget()

    def charge(self, tenant: str, seconds: float) -> None:
        """Service was given."""
        with self._lock:
            account = self._of(tenant)
            account.served += seconds
            account.level += seconds / account.weight

    def level(self, tenant: str) -> float:
        """Of one tenant."""
        account = self._accounts.get(tenant)
        return account.level if account else 0.0

    def rank(self, tenant: str) -> tuple[float, int]:
        """What decides whose turn it is: the level, and where that is the same how many it has running."""
        return self.level(tenant), self.running(tenant)

    def running(self, tenant: str) -> int:
        """How many of its sequences run."""
        account = self._accounts.get(tenant)
        return account.running if account else 0

    def excess(self, tenant: str) -> float:
        """How many more of its sequences run than its share of all that run, among tenants with something
        open."""
        with self._lock:
            busy = [a for a in self._accounts.values() if a.waiting or a.running]
            account = self._of(tenant)
            share = account.weight / sum(a.weight for a in busy) if busy else 1.0
            return account.running - share * sum(a.running for a in busy)

    def snapshot(self) -> tuple[tuple[str, int, int, float], ...]:
        """(tenant, waiting, running, seconds served) of each that is known."""
        with self._lock:
            return tuple((n, a.waiting, a.running, a.served) for n, a in self._accounts.items())

    def _of(self, tenant: str) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account()
        return account

    def _leave(self, tenant: str) -> None:
        account = self._of(tenant)
        account.waiting -= 1
        if not account.waiting:
            self._last = tenant

    def _forget(self) -> None:
        """Lets go of the least served of those that have nothing open, where they are many: they would be
        lifted over their level anyway."""
        if len(self._accounts) <= _MAX_IDLE:
            return
        idle = [n for n, a in self._accounts.items() if not a.waiting and not a.running]
        for name in sorted(idle, key=self.level)[: len(self._accounts) - _MAX_IDLE]:
            if name != self._last:
                del self._accounts[name]
