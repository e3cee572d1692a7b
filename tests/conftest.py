"""Test-wide settings: CPU, and a user's cache of the run's own for all its workers and their children."""

import gc
import os
import shutil
import tempfile

from hypothesis import HealthCheck, settings

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# How fast examples are drawn, and run, is how busy the machine is: no test fails for that.
settings.register_profile("jblock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jblock")
# What tests before left is not a forked process's to free: arrays of devices whose threads it lacks, servers.
os.register_at_fork(after_in_child=gc.freeze)


def pytest_configure(config) -> None:
    """What one test compiled, the next one loads; nothing is read from, or left in, the user's real cache."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="jblock-test-cache-")
        os.environ["XDG_CACHE_HOME"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
