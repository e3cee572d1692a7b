"""CPU devices that are not there, for processes that tests start."""

import os


def flags(count: int) -> str:
    """The value of XLA_FLAGS that makes `count` of them, beside what the tests themselves run with."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
