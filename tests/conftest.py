"""Test-wide settings: CPU, and one thread pool per worker so that parallel tests stay predictable."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
