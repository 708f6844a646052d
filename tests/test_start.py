"""The examples of the first page weigh the edge term, in ten lines at most."""

import re
from pathlib import Path

import pytest
import torch

from contrastive_exudate_loss import CombinedExudateLoss

PAGE = (Path(__file__).parents[1] / "docs/start.md").read_text()
EXAMPLES = dict(re.findall(r"^## ([A-D])\. .*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_weighs_the_edge_term_from_its_second_step_on(name, monkeypatch):
    steps, terms = [], CombinedExudateLoss.terms
    monkeypatch.setattr(CombinedExudateLoss, "terms", lambda *given: steps.append(terms(*given)) or steps[-1])
    torch.manual_seed(0)
    exec(compile(EXAMPLES[name], name, "exec"), {})
    first, second = steps
    assert first.beta == 0
    assert second.beta > 0
    assert second.total > second.supervised > 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_ten_lines_at_most_beside_imports_and_data(name):
    _, _, yours = EXAMPLES[name].partition("# yours\n")
    assert 0 < len([line for line in yours.splitlines() if line]) <= 10
