"""Figures: medians, percentiles, and what a JSON line carries."""

import json

import pytest

from bench import report


def test_percentile_is_a_value_that_occurred():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [report.percentile(values, p) for p in (0, 20, 50, 95, 100)] == [1, 1, 3, 5, 5]
    assert report.percentile(list(range(1, 101)), 95) == 95
    with pytest.raises(ValueError, match="nothing"):
        report.percentile([], 50)


def test_spread_tells_the_noise():
    assert report.spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0, "n": 3}


def test_a_line_says_what_ran_where():
    line = json.loads(report.line("roofline", True, {"roofline": {}}))
    assert line["scenario"] == "roofline"
    assert line["quick"] is True
    assert set(line["versions"]) == {"jax", "jaxlib", "python"}
    assert line["threads"] >= 1
