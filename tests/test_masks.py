"""The making of masks as operators of the compiler; what they hold is in test_losses and test_morphology."""

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
