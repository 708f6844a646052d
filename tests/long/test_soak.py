"""The short form of soak.py: the first of its random calls."""

import pytest
import soak


@pytest.mark.parametrize(("check", "count"), [(soak.valid_call, 150), (soak.invalid_call, 600)])
def test_random_calls_keep_every_promise(check, count):
    assert soak.failures(check, range(count)) == {}


def test_the_soak_notices_a_wrong_gradient_and_a_call_that_passes(monkeypatch):
    right = soak.Call.wanted
    monkeypatch.setattr(soak.Call, "wanted", lambda call: (found := right(call)) and (found[0], found[1] + 1))
    assert soak.failures(soak.valid_call, range(20))
    monkeypatch.setattr(soak, "WRONG", {"temperature": [0.5]})
    monkeypatch.setattr(soak, "OPTIONS", {soak.PatchDensityContrastLoss: ("temperature",)})
    assert any("passes" in text for text in soak.failures(soak.invalid_call, range(20)).values())
