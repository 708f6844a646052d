"""The recipe for real photographs, run as its page shows it on nine of IDRiD's."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contrastive_exudate_loss import CombinedExudateLoss

PAGE = (Path(__file__).parents[1] / "docs/photographs.md").read_text()
IMAGES, MASKS = "1. Original Images", "2. All Segmentation Groundtruths"
# The first has the mask with an alpha channel; the last gets none, as where a photograph does not show the lesion.
NUMBERS = (81, 2, 3, 4, 5, 7, 8, 9, 6)
pytestmark = pytest.mark.skipif("IDRID" not in os.environ, reason="set IDRID to the folder of the data set")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What the recipe's names are after two epochs, the terms of its steps, and where it ran."""
    root, idrid = tmp_path_factory.mktemp("idrid"), Path(os.environ["IDRID"])
    photographs = root / IMAGES / "a. Training Set"
    masks = root / MASKS / "a. Training Set/3. Hard Exudates"
    photographs.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number, source in enumerate(NUMBERS, 1):
        split = "a. Training Set" if source < 55 else "b. Testing Set"
        (photographs / f"IDRiD_{number:02}.jpg").symlink_to(idrid / IMAGES / split / f"IDRiD_{source:02}.jpg")
        if number < len(NUMBERS):
            mask = idrid / MASKS / split / f"3. Hard Exudates/IDRiD_{source:02}_EX.tif"
            (masks / f"IDRiD_{number:02}_EX.tif").symlink_to(mask)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert "range(100)" in code
    names, steps, terms = {}, [], CombinedExudateLoss.terms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CombinedExudateLoss, "terms", lambda *given: steps.append(terms(*given)) or steps[-1])
        patch.setenv("IDRID", str(root))
        patch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # or it asks PyPI for its newest version
        patch.chdir(root)
        torch.manual_seed(0)
        exec(compile(code.replace("range(100)", "range(2)"), "photographs", "exec"), names)
    return names, steps, root


def test_the_recipe_trains_and_weighs_the_edge_term(run):
    _, steps, _ = run
    assert len(steps) == 2
    assert steps[-1].supervised != steps[0].supervised
    assert steps[-1].supervised.isfinite()
    assert steps[-1].beta > 0


def test_the_recipe_logs_every_term_and_f1(run):
    names, steps, root = run
    logged = {}
    for name in (*steps[0]._fields, "F1"):
        events = EventAccumulator(str(next(root.glob(f"runs/*/epoch_{name}")))).Reload()
        logged[name] = [event.value for event in events.Scalars("epoch")]
    assert logged.pop("F1")[-1] == pytest.approx(names["values"]["F1"])
    assert logged == {name: [getattr(step, name).item() for step in steps] for name in steps[0]._fields}


def test_a_pixel_of_the_recipes_target_is_lesion_from_a_quarter_of_it_on(run):
    names, _, _ = run
    first, other = names["validation"]
    with Image.open(names["files"][0].parents[2] / MASKS / "a. Training Set/3. Hard Exudates/IDRiD_01_EX.tif") as mask:
        red = torch.from_numpy(np.asarray(mask)[..., 0] > 0)
    quarters = torch.nn.functional.avg_pool2d(red[None].double(), 4) >= 0.25
    expected = torch.nn.functional.pad(quarters, (8, 8, 12, 12))  # 1072 x 712 to multiples of 32
    assert torch.equal(first[1], expected.float())
    assert other[1].any()
