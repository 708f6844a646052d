"""The base of the losses: when options and the target's values are checked."""

from typing import Any

import torch
from torch import Tensor, nn

from contrastive_exudate_loss import _checks


class MaskLoss(nn.Module):
    """A loss whose target is a mask of 0, 1 and ignore_index.

    A constructor sets the options and ends with self._check_changed_options(); every call begins with it.
    """

    # Class attributes, which pickles of 0.1.0 lack.
    _options_checked = False
    _values_checked = False

    def __init__(self, ignore_index: int | None) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, _checks.plain_option(value))
        # Setting a weight checks it; marking it here would recompile compiled code when a weight changes.
        if not name.startswith("_") and name not in ("training", "alpha", "beta"):
            self._options_checked = False

    def _check_changed_options(self) -> None:
        """Raise unless the options make sense, alone and together; costs nothing if none was set since."""
        if torch.compiler.is_compiling():  # the compiler runs this once, and would again if the mark changed
            self._check_options()
        elif not self._options_checked:
            self._check_options()
            self._options_checked = True

    def _check_options(self) -> None:
        _checks.check_ignore_index(self.ignore_index)

    def _reads(self, target: Tensor) -> bool:
        """Whether the target's values are read: on each call on the CPU, else on the first."""
        return _checks.may_read(target) and (target.is_cpu or not self._values_checked)

    def _check_values(self, target: Tensor, ignore_indices: list[int | None]) -> bool:
        """Check the target's values against 0, 1 and each ignore_index; returns whether they were read."""
        reads = self._reads(target)
        if reads:
            for ignore_index in dict.fromkeys(ignore_indices):
                _checks.check_target_values(target, ignore_index)
            self._values_checked = True
        return reads
