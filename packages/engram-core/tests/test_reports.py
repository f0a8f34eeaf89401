"""What reports tell of their figures."""

import pytest

from engram_core import Measure


@pytest.mark.parametrize(
    ("values", "difference"),
    [
        ({"base": 1.0, "engram": 3.0}, 2.0),
        ({"base": 1.0, "engram": 3.0, "lora": 2.0}, 2.0),
        ({"base": 1.0, "lora": 2.0}, None),
        ({"engram": 1.0, "lora": 2.0}, None),
        ({"engram": 1.0}, None),
    ],
)
def test_the_difference_is_what_the_engram_changes(values, difference):
    measure = Measure(subject="texts", metric="loss", values=values, higher_is_better=False)
    assert measure.difference == difference
    assert measure.to_json()["difference"] == difference
