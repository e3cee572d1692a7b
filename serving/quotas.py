"""What a tenant may use in a minute: token buckets, which hold a minute's worth and fill evenly."""

import dataclasses
import math
import time
from collections.abc import Callable

from serving.errors import exhausted, invalid
from serving.tenants import Tenant


class Bucket:
    """What is left of one quota. It may go below zero: what was used is used."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._level = 0.0
        self._limit = 0
        self._at = clock()

    def level(self, limit: int) -> float:
        """What is left now. A quota that was changed begins full."""
        now = self._clock()
        if limit != self._limit:
            self._level, self._limit = float(limit), limit
        self._level = min(self._level + (now - self._at) * limit / 60, float(limit))
        self._at = now
        return self._level

    def take(self, limit: int, amount: float) -> float:
        """Takes an amount, and returns 0; or takes nothing, and returns the seconds until it is there."""
        missing = amount - self.level(limit)
        if missing > 1e-9:
            return missing * 60 / limit
        self._level -= amount
        return 0.0

    def give_back(self, limit: int, amount: float) -> None:
        """Puts back what was taken and not used; below zero takes what was used besides."""
        self._level = min(self.level(limit) + amount, float(limit))


@dataclasses.dataclass
class _Used:
    requests: Bucket
    tokens: Bucket


class Quotas:
    """The buckets of all tenants of a server. There are as many as its file of tenants has had names."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._used: dict[str, _Used] = {}

    def request(self, tenant: Tenant) -> None:
        """Counts a call.

        Raises:
          RequestError: RESOURCE_EXHAUSTED, it may make none now.
        """
        limit = tenant.requests_per_minute
        wait = self._of(tenant).requests.take(limit, 1) if limit else 0.0
        if wait:
            raise exhausted(
                f"requests_per_minute: tenant {tenant.name} may make {limit} requests in a minute; "
                f"send this one in {_seconds(wait)}",
                by_tenant=True,
                retry_after=wait,
            )

    def reserve(self, tenant: Tenant, prompt: int, output: int) -> "Reservation":
        """Takes the tokens that a call may use at most, until it is known how many it did.

        Args:
          tenant: whose.
          prompt: tokens of its prompts.
          output: most tokens of its answers.

        Raises:
          RequestError: they are not there now, or the prompts alone would never be.
        """
        limit = tenant.tokens_per_minute
        if not limit:
            return Reservation(None, 0, 0)
        if prompt > limit:
            raise invalid(
                f"prompt: has {prompt} tokens, and tokens_per_minute of tenant {tenant.name} is {limit}; "
                "shorten it"
            )
        # An answer may be longer than a minute allows; it begins when the minute is whole.
        amount = min(prompt + output, limit)
        bucket = self._of(tenant).tokens
        wait = bucket.take(limit, amount)
        if wait:
            raise exhausted(
                f"tokens_per_minute: tenant {tenant.name} may use {limit} tokens in a minute, and this "
                f"request up to {amount}; send it in {_seconds(wait)}, or with a smaller max_tokens",
                by_tenant=True,
                retry_after=wait,
            )
        return Reservation(bucket, limit, amount)

    def headers(self, tenant: Tenant) -> list[tuple[str, str]]:
        """What OpenAI's clients read of quotas: the limit, what is left of it, and when it is whole again."""
        found = []
        used = self._of(tenant)
        for kind, limit, bucket in (
            ("requests", tenant.requests_per_minute, used.requests),
            ("tokens", tenant.tokens_per_minute, used.tokens),
        ):
            if limit:
                left = bucket.level(limit)
                reset = (limit - left) * 60 / limit
                found += [
                    (f"x-ratelimit-limit-{kind}", str(limit)),
                    (f"x-ratelimit-remaining-{kind}", str(max(math.floor(left), 0))),
                    (f"x-ratelimit-reset-{kind}", _duration(reset)),
                ]
        return found

    def _of(self, tenant: Tenant) -> _Used:
        if tenant.name not in self._used:
            self._used[tenant.name] = _Used(Bucket(self._clock), Bucket(self._clock))
        return self._used[tenant.name]


class Reservation:
    """Tokens that a call took before it used them."""

    def __init__(self, bucket: Bucket | None, limit: int, amount: int):
        self._bucket, self._limit, self._amount = bucket, limit, amount

    def settle(self, used: int) -> None:
        """The call is over, and has used so many. A second time does nothing."""
        if self._bucket is not None:
            self._bucket.give_back(self._limit, self._amount - used)
            self._bucket = None


def _seconds(wait: float) -> str:
    return f"{max(math.ceil(wait), 1)} s"


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 12ms, 1.5s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{seconds:.3g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"
