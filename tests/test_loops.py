"""The recipes for other packages' training loops, run as the documents show them, lower the loss by both its parts."""

import re
from pathlib import Path

import pytest
import torch

from contrastive_exudate_loss import CombinedExudateLoss

TEXT = (Path(__file__).parents[1] / "docs/loops.md").read_text()
RECIPES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "torch.compile"])
def test_a_recipe_lowers_the_loss(name, monkeypatch, tmp_path):
    training, validation, weights = [], [], []
    terms = CombinedExudateLoss.terms

    def recorded(self, *arguments):
        found = terms(self, *arguments)
        (training if torch.is_grad_enabled() else validation).append(found)
        weights.append(float(found.beta))
        return found

    monkeypatch.setattr(CombinedExudateLoss, "terms", recorded)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(RECIPES[name], name, "exec"), {})
    assert len(training) >= 4
    # The weight moves, so the totals of two steps cannot be compared.
    first, last = (found.supervised.item() + weights[-1] * found.edge.item() for found in (training[0], training[-1]))
    assert last < first
    assert weights[0] == 0  # in the first step, and in Lightning's check before it
    assert weights[-1] > 0
    assert bool(validation) == ("alidat" in RECIPES[name] or "evaluate" in RECIPES[name])


def test_the_compiled_recipe_lowers_the_loss():
    torch.compiler.reset()
    torch.manual_seed(0)
    names = {}
    exec(compile(RECIPES["torch.compile"], "compiled", "exec"), names)
    eager = names["criterion"](names["model"](names["images"]), names["target"])
    assert eager < names["loss"]  # of the weights before the last step
