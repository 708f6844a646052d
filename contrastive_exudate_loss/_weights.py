"""The base of CombinedExudateLoss: the weights of its two terms, numbers or Pulls, and what is saved of them."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from contrastive_exudate_loss import _checks, fused, pull
from contrastive_exudate_loss._options import MaskLoss
from contrastive_exudate_loss.distributed import sum_of_ranks
from contrastive_exudate_loss.features import FeatureTap
from contrastive_exudate_loss.graph import begins_a_static_graph
from contrastive_exudate_loss.norms import COUNT
from contrastive_exudate_loss.origin import layer_input
from contrastive_exudate_loss.pull import Pull

# For a Pull without a tap's measurement, the supervised loss is differentiated at the features in each of the first
# OFTEN training calls, then in every SELDOM-th.
OFTEN, SELDOM = 100, 20
CALLS_WITHOUT_BACKWARD = 20  # training calls after which a missing backward pass is warned of


class WeightedLoss(MaskLoss):
    """A loss whose density term has the weight alpha and whose edge term has the weight beta.

    A subclass's constructor calls this one, and then sets tap.
    """

    # Class attributes, which pickles of earlier versions lack. The state, made by the first Pull, is a dictionary since
    # torch.load(weights_only=True) refuses classes.
    _pull_state: dict[str, Tensor] | None = None
    _pull_calls, _pull_known = 0, False
    _calls_to_look = CALLS_WITHOUT_BACKWARD
    tap: FeatureTap | None = None

    def __init__(self, alpha: float | Pull, beta: float | Pull, ignore_index: int | None) -> None:
        super().__init__(ignore_index)
        self.alpha = alpha
        self.beta = beta

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "features":  # the constructor's name for the tap
            raise AttributeError("features cannot be set; set criterion.tap = model")
        if name in ("alpha", "beta") and isinstance(value, nn.Module):
            raise TypeError(
                f"{name} must be a number or a Pull, got a {type(value).__name__}; give a model as features= and a "
                "loss as supervised="
            )
        # nn.Module would register a model as a part of the criterion.
        super().__setattr__(name, FeatureTap(value) if name == "tap" and isinstance(value, nn.Module) else value)
        if name == "tap" and isinstance(self.tap, FeatureTap):
            self._measure_at_the_tap(anew=True)

    @property
    def alpha(self) -> float | Pull:
        """Weight of the density term."""
        return self._alpha if isinstance(self._alpha, Pull) else float(self._alpha)

    @alpha.setter
    def alpha(self, value: float | Pull) -> None:
        self._alpha, self._uses_density = self._weight("alpha", value)

    @property
    def beta(self) -> float | Pull:
        """Weight of the edge term."""
        return self._beta if isinstance(self._beta, Pull) else float(self._beta)

    @beta.setter
    def beta(self, value: float | Pull) -> None:
        self._beta, self._uses_edge = self._weight("beta", value)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tap": None}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in (("alpha", self._alpha), ("beta", self._beta)):
            if not isinstance(weight, Pull):
                destination[prefix + name] = weight.clone()
        if self._pull_state is not None:
            destination[f"{prefix}pull"] = torch.cat(list(self._pull_state.values()))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """The constructor decides which weights are Pulls; the state, which may be missing, only sets values."""
        own = dict(state_dict)
        for name, weight in (("alpha", self._alpha), ("beta", self._beta)):
            number = own.pop(prefix + name, None)
            if number is not None and not isinstance(weight, Pull):
                setattr(self, name, float(number))
        numbers = own.pop(f"{prefix}pull", None)
        if numbers is not None and self._pull_state is not None:
            sizes = [len(tensor) for tensor in self._pull_state.values()]
            if len(numbers) != sum(sizes):
                errors: list[str] = arguments[-1]
                errors.append(
                    f"{prefix}pull must have {sum(sizes)} numbers, got {len(numbers)}; leave it out to measure anew"
                )
            else:
                for tensor, loaded in zip(self._pull_state.values(), numbers.split(sizes), strict=True):
                    tensor.copy_(loaded)
                self._pull_known = pull.known(self._pull_state)
                self._pull_calls = int(numbers[pull.STEP])
        super()._load_from_state_dict(own, prefix, *arguments)

    def _measure_at_the_tap(self, *, anew: bool = False) -> None:
        """Let the tap write down, for a Pull, the norm of the gradient at its layer's input.

        Args:
            anew: whether the tap or the state is new; if not, the tap's record may have moved to another device.
        """
        state, tap = self._pull_state, self.tap
        if state is not None and tap is not None and state["layer"] is not tap.norm:
            if anew and not tap.norm.any():  # from the last backward pass, under another tap or loaded
                tap.norm.copy_(state["layer"])
            elif anew:  # its record is of other passes
                state["means"][pull.SEEN][1] = tap.norm[COUNT]
            tap.measures, state["layer"] = True, tap.norm

    def _weight(self, name: str, value: float | Pull) -> tuple[Tensor | Pull, bool]:
        """The weight as it is stored, and whether its term is in use."""
        if isinstance(value, Pull):
            if self._pull_state is None:
                self._pull_state = pull.new_state()
                self._measure_at_the_tap(anew=True)
            return value, True
        try:
            _checks.check_number(name, value, 0)
        except TypeError as error:
            is_tensor = isinstance(value, Tensor)
            remedy = f"give {name}.item()" if is_tensor else "for a weight that sets itself give Pull(2.0)"
            raise TypeError(f"{error}; {remedy}") from None
        # The compiler specialises on a float and would compile again for the next one; a tensor is an input.
        return torch.tensor(value, dtype=torch.float64, device="cpu"), bool(value)

    def _has_pull(self) -> bool:
        return isinstance(self._alpha, Pull) or isinstance(self._beta, Pull)

    def _pulled(
        self,
        supervised: Tensor,
        features: Tensor,
        temperatures: Sequence[float],
        *,
        is_tapped: bool,
        over_ranks: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The weights of density and edge, and for each term in use the features whose gradient is measured.

        Args:
            supervised: the supervised loss.
            features: for the terms.
            temperatures: of density and edge.
            is_tapped: whether they come from the tap unchanged.
            over_ranks: whether all processes of torch.distributed are to use the same weights.

        Raises:
            ValueError: in a training call, if there is no mean and no way to measure one.
        """
        state = cast("dict[str, Tensor]", self._pull_state)
        if any(tensor.device != features.device for tensor in state.values()):
            state.update((name, tensor.to(features.device)) for name, tensor in state.items())
        used = [n for n, is_used in enumerate((self._uses_density, self._uses_edge)) if is_used]
        pulls = [weight if isinstance(weight, Pull) else None for weight in (self._alpha, self._beta)]
        if not (torch.is_grad_enabled() and features.requires_grad):
            return self._with_numbers(pull.last_weights(state, pulls)), [features] * len(used)
        # The state holds the last backward pass; measuring by hand below already overwrites it.
        summed = sum_of_ranks if over_ranks else None
        weights = self._with_numbers(
            pull.advanced_weights(state, pulls, features, temperatures, summed, fused.runs(features))
        )
        if not self._measure(supervised, features, is_tapped=is_tapped):
            which = "beta" if pulls[1] is not None else "alpha"
            raise ValueError(
                f"{which} sets itself from gradient norms at the features (it is a Pull), but none could be measured; "
                "run some eager training steps before you compile or capture; give the features that the logits are "
                "made from, (B, C, h, w); or give a number, such as beta=0.02"
            )
        self._look_at_records(features)
        return weights, [
            features if pulls[n] is None else pull.measured_features(features, state, n, weights) for n in used
        ]

    def _look_at_records(self, features: Tensor) -> None:
        """Warn once where the first training calls had no backward pass through the total."""
        if not _checks.may_read(features):
            return
        self._calls_to_look -= 1
        if self._calls_to_look == 0 and not bool(cast("dict[str, Tensor]", self._pull_state)["terms"][COUNT]):
            _checks.warn(
                f"no backward pass came through the criterion's total in {CALLS_WITHOUT_BACKWARD} training calls, so "
                "its Pull stays 0; differentiate what the criterion returns, or terms(...).total, not a sum of its "
                "parts",
            )

    def _with_numbers(self, weights: Tensor) -> Tensor:
        """The weights, changed in place: each that is a number, and is 0 so far, gets that number."""
        for n, (weight, is_used) in enumerate(((self._alpha, self._uses_density), (self._beta, self._uses_edge))):
            if is_used and not isinstance(weight, Pull):
                weights[n].add_(weight)  # a copy from the CPU would make CUDA wait
        return weights

    def _measure(self, supervised: Tensor, features: Tensor, *, is_tapped: bool) -> bool:
        """Measure the supervised loss by differentiating if the tap does not.

        Returns whether there is a mean of it or will be one.
        """
        state = cast("dict[str, Tensor]", self._pull_state)
        source, measured = None, False
        if self.tap is not None:
            source, measured = layer_input(self.tap, None if is_tapped else features)
        if measured or not _checks.may_read(features):
            return measured or self._pull_known
        self._pull_calls += 1
        if supervised.grad_fn is not None and begins_a_static_graph(supervised.grad_fn):
            return True
        if self._pull_calls <= OFTEN or self._pull_calls % SELDOM == 0:
            source = features if source is None else source
            self._pull_known |= supervised.requires_grad and pull.differentiated(supervised, source, state)
        self._pull_known = self._pull_known or pull.known(state)  # the tap may have measured in earlier calls
        return self._pull_known
