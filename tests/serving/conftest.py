"""Two servers that most tests share: one that answers at once, one that takes its time."""

import pytest
import server_harness as harness


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    with harness.serving(harness.mock(tmp_path_factory.mktemp("tokenizer"))) as running:
        yield running
        assert harness.eventually(running.is_empty)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    engine = harness.mock(tmp_path_factory.mktemp("tokenizer"), step_delay=0.01)
    with harness.serving(engine, max_queue=4) as running:
        yield running
        assert harness.eventually(running.is_empty)


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    """After each test every page and place of the servers it used is back."""
    yield
    for name in ("fast", "slow"):
        if name in request.fixturenames:
            assert harness.eventually(request.getfixturevalue(name).is_empty)
