"""The making of masks, as operators of the compiler too; most of what they hold is in test_losses and elsewhere."""

import pytest
import torch

from contrastive_exudate_loss import masks as module


@pytest.mark.parametrize("masks", module._OPERATORS, ids=lambda masks: masks.__name__)
def test_operators_of_masks_keep_the_rules_of_torch_library(masks):
    target = (torch.arange(40 * 24).reshape(1, 2, 20, 24) % 7 < 3).long()
    inputs = {
        "_density_masks": (target, (8, 5), -1),
        "_edge_masks": (target, (8, 5), (1, 2), (2, 3), "cross", True, 0.3, None),
        "_joined": ([target > 0, target == 0],),
    }[masks.__name__]
    torch.library.opcheck(module._OPERATORS[masks], inputs)


@pytest.mark.parametrize("ignored", [-1, 2, 255])
def test_any_value_may_mark_pixels_to_ignore(ignored):
    target = torch.tensor([0, 1, ignored]).view(1, 1, 1, 3)
    lesion, valid = module.lesion_and_valid(target, ignored)
    assert lesion.flatten().tolist() == [False, True, False]
    assert valid.flatten().tolist() == [True, True, False]


def test_an_isolated_patch_with_any_background_has_its_whole_border_for_contour():
    target = torch.ones(1, 1, 6, 6)
    target[..., 0, 0] = 0
    inner, outer = module.edge_regions(target, (6, 6), (1, 1), (1, 1), "square", True, None, None).masks
    ring = torch.ones(6, 6, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    wanted = ring.clone()
    wanted[0, 0], wanted[1, 1] = False, True  # the background, and the lesion beside it inside the ring
    assert torch.equal(inner[0, 0], wanted)
    assert torch.equal(outer[0, 0], target[0, 0] == 0)
