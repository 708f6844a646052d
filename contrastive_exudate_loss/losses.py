"""The three losses: check what comes in, compose the parts, weigh the terms."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from contrastive_exudate_loss import _checks
from contrastive_exudate_loss._options import MaskLoss
from contrastive_exudate_loss._supervised import binary_cross_entropy, watched
from contrastive_exudate_loss._terms import Candidates, PatchContrastLoss, full_precision, plain, term_losses
from contrastive_exudate_loss.features import FeatureTap, check_gradient, taken_features
from contrastive_exudate_loss.masks import Regions, density_regions, edge_regions
from contrastive_exudate_loss.morphology import FOOTPRINTS
from contrastive_exudate_loss.pooling import embeddings

if TYPE_CHECKING:  # not in Python 3.10
    from typing import Self


class PatchDensityContrastLoss(PatchContrastLoss):
    """Contrast of the mean features of dense patches against those of sparse patches.

    A patch is dense when its lesion fraction (lesion pixels / valid pixels) is above threshold, else sparse.
    Each class of the target has its own contrast, over all images of the batch, and the classes are averaged.

    Args:
        patch_size: side of a patch in target pixels, >= 1; None means 16 unless num_patches is given.
        num_patches: n >= 1, instead of patch_size: sides ceil(H / n) and ceil(W / n), so at most n patches per axis.
        threshold: lesion fraction above which a patch is dense, 0 <= threshold < 1.
        temperature: divides the cosine similarities, >= 0.001.
        contrast: "nt_xent" (mean over positive pairs) or "sup_con" (Khosla et al., mean over anchors).
        select: "all", or an int k >= 2: of each class only the k densest dense and the k sparsest sparse patches of
            the batch.
        max_patches: of each class and label at most that many (>= 2) random patches, drawn anew at each call; not
            with select.
        ignore_index: target value of pixels that count for nothing, neither 0 nor 1. A patch without valid pixels
            takes no part. With 255, the lesions of a 0/255 mask would all be ignored.
        gather_distributed: contrast the patches of all processes of torch.distributed's default group, so that value
            and averaged gradients (as of DistributedDataParallel) are those of one process with the whole batch. Each
            process must call the loss, with the same K and C. select acts on all patches, max_patches on those of
            each process. Nothing is gathered under torch.no_grad().

    Shape:
        - features: (B, C, h, w), floating, C >= 2; any h and w (pixel (i, j) reads (floor(i h / H), floor(j w / W))).
        - target: (B, K, H, W) of 0, 1 and ignore_index; bool, integer or floating.

        Half-precision features are pooled and contrasted in float32, also under autocast; the products follow
        torch.set_float32_matmul_precision. A NaN or infinity in the features, ignored pixels included, may give NaN.
        Returns (), float32 (float64 for float64 features): 0, with zero gradients, where no patch is dense, none is
        sparse, or no label has two.

    Raises:
        TypeError, ValueError: an option or a tensor is not as above, or processes that gather disagree. The target's
            values are checked at every call on the CPU, at the first call on CUDA, and never in compiled code.

    Example:
        >>> features = torch.rand(2, 8, 64, 64, requires_grad=True)
        >>> target = torch.zeros(2, 1, 64, 64)
        >>> target[:, :, 16:48, 16:48] = 1
        >>> loss = PatchDensityContrastLoss(patch_size=16)(features, target)
        >>> loss.backward()

    Reference:
        Tang et al. 2023, arXiv 2302.11517, patch density.
    """

    def __init__(
        self,
        patch_size: int | None = None,
        *,
        num_patches: int | None = None,
        threshold: float = 0.5,
        temperature: float = 0.05,
        contrast: str = "nt_xent",
        select: int | Literal["all"] = "all",
        max_patches: int | None = None,
        ignore_index: int | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(patch_size, num_patches, temperature, contrast, max_patches, ignore_index, gather_distributed)
        self.threshold = threshold
        self.select = select
        self._check_changed_options()

    def _check_options(self) -> None:
        super()._check_options()
        _checks.check_number("threshold", self.threshold, 0, below=1)
        if isinstance(self.select, str):
            _checks.check_choice("select", self.select, ("all",))
        else:
            _checks.check_integer("select", self.select, 2)
            if self.max_patches is not None:
                raise ValueError(f"give select or max_patches, not both, got {self.select} and {self.max_patches}")

    def _selects(self) -> int | None:
        return None if isinstance(self.select, str) else self.select

    def _regions(self, target: Tensor, sides: tuple[int, int]) -> Regions:
        return density_regions(target, sides, self.ignore_index)

    def _candidates(self, sums: Tensor, counts: Tensor, regions: Regions) -> Sequence[Candidates]:
        pooled = embeddings(sums, counts), counts.bool(), cast(Tensor, regions.fraction)
        # (B, K, gh, gw) to (K, M)
        vectors, present, fraction = (tensor.movedim(1, 0).flatten(1, 3) for tensor in pooled)
        dense = fraction > self.threshold
        labels = dense.to(counts.device)
        if self._selects() is None:
            return [Candidates(*own) for own in zip(vectors, labels, present, strict=True)]
        densest_and_sparsest_first = torch.where(dense, -fraction, fraction)
        return [Candidates(*own) for own in zip(vectors, labels, present, densest_and_sparsest_first, strict=True)]


class PatchEdgeContrastLoss(PatchContrastLoss):
    """Contrast of the mean features just inside lesion contours against those just outside.

    The inner band holds the lesion pixels within inner_radius of background, the outer band the background pixels
    within outer_radius of a lesion. The image border is no contour, and ignored pixels are neither lesion nor
    background. In each patch each band gives one embedding, an empty band none.
    Each class of the target has its own contrast, over all images of the batch, and the classes are averaged.

    Args:
        patch_size: side of a patch in target pixels, >= 1; None means 16 unless num_patches is given.
        num_patches: n >= 1, instead of patch_size: sides ceil(H / n) and ceil(W / n), so at most n patches per axis.
        inner_radius: in target pixels, >= 1; with density_threshold also a pair (in sparse, in dense patches).
        outer_radius: likewise.
        footprint: what within a radius means: "square" (Chebyshev distance) or "cross" (Manhattan distance).
        isolate_patches: cut each patch out first. Its outside, also the image's, counts as background for the inner
            band, and a patch whose valid pixels are all lesion or all background has no contour.
        scope: "patch" (one inner and one outer embedding a patch) or "image" (one of each an image).
        density_threshold: lesion fraction above which a patch is dense, 0 <= threshold < 1; a pixel's radius is then
            that of its patch.
        temperature: divides the cosine similarities, >= 0.001.
        contrast: "nt_xent" (mean over positive pairs) or "sup_con" (Khosla et al., mean over anchors).
        max_patches: of each class and label at most that many (>= 2) random embeddings, drawn anew at each call.
        ignore_index: target value of pixels that count for nothing, neither 0 nor 1. With 255, the lesions of a
            0/255 mask would all be ignored.
        gather_distributed: contrast the bands of all processes of torch.distributed's default group, so that value
            and averaged gradients (as of DistributedDataParallel) are those of one process with the whole batch. Each
            process must call the loss, with the same K and C. max_patches acts on the bands of each process. Nothing
            is gathered under torch.no_grad().

    Shape:
        - features: (B, C, h, w), floating, C >= 2; any h and w (pixel (i, j) reads (floor(i h / H), floor(j w / W))).
        - target: (B, K, H, W) of 0, 1 and ignore_index; bool, integer or floating.

        Half-precision features are pooled and contrasted in float32, also under autocast; the products follow
        torch.set_float32_matmul_precision. A NaN or infinity in the features, ignored pixels included, may give NaN.
        Returns (), float32 (float64 for float64 features): 0, with zero gradients, where there is no contour or no
        band has two embeddings.

    Raises:
        TypeError, ValueError: an option or a tensor is not as above, or processes that gather disagree. The target's
            values are checked at every call on the CPU, at the first call on CUDA, and never in compiled code.

    Example:
        >>> features = torch.rand(2, 8, 16, 16, requires_grad=True)
        >>> target = torch.zeros(2, 1, 64, 64)
        >>> target[:, :, 20:40, 20:40] = 1
        >>> loss = PatchEdgeContrastLoss(inner_radius=1, outer_radius=3, footprint="cross")(features, target)
        >>> loss.backward()

    Reference:
        Tang et al. 2023, arXiv 2302.11517, patch edge.
    """

    def __init__(
        self,
        patch_size: int | None = None,
        *,
        num_patches: int | None = None,
        inner_radius: int | tuple[int, int] = 2,
        outer_radius: int | tuple[int, int] = 2,
        footprint: str = "square",
        isolate_patches: bool = False,
        scope: str = "patch",
        density_threshold: float | None = None,
        temperature: float = 0.05,
        contrast: str = "nt_xent",
        max_patches: int | None = None,
        ignore_index: int | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(patch_size, num_patches, temperature, contrast, max_patches, ignore_index, gather_distributed)
        self.inner_radius = inner_radius
        self.outer_radius = outer_radius
        self.footprint = footprint
        self.isolate_patches = isolate_patches
        self.scope = scope
        self.density_threshold = density_threshold
        self._check_changed_options()

    def _check_options(self) -> None:
        super()._check_options()
        by_density = self.density_threshold is not None
        if by_density:
            _checks.check_number("density_threshold", self.density_threshold, 0, below=1)
        _checks.check_radius("inner_radius", self.inner_radius, pairs=by_density)
        _checks.check_radius("outer_radius", self.outer_radius, pairs=by_density)
        _checks.check_choice("footprint", self.footprint, FOOTPRINTS)
        _checks.check_flag("isolate_patches", self.isolate_patches)
        _checks.check_choice("scope", self.scope, ("patch", "image"))

    def _regions(self, target: Tensor, sides: tuple[int, int]) -> Regions:
        inner, outer = ((r, r) if isinstance(r, int) else r for r in (self.inner_radius, self.outer_radius))
        options = self.footprint, self.isolate_patches, self.density_threshold, self.ignore_index
        return edge_regions(target, sides, inner, outer, *options)

    def _candidates(self, sums: Tensor, counts: Tensor, regions: Regions) -> Sequence[Candidates]:
        if self.scope == "image":
            sums, counts = sums.sum((2, 3), keepdim=True), counts.sum((2, 3), keepdim=True)
        # (B, 2 K, gh, gw) to (K, 2, B, gh, gw): of each class all inner embeddings, then all outer ones.
        bands = (2, counts.shape[1] // 2)
        vectors = embeddings(sums, counts).unflatten(1, bands).movedim((2, 1), (0, 1))
        present = counts.bool().unflatten(1, bands).movedim((2, 1), (0, 1))
        labels = torch.zeros_like(present)
        labels[:, 0] = True
        flat = vectors.flatten(1, 4), labels.flatten(1), present.flatten(1)
        return [Candidates(*own) for own in zip(*flat, strict=True)]


class LossTerms(NamedTuple):
    """What CombinedExudateLoss.terms gives: total = supervised + alpha density + beta edge, each a scalar tensor."""

    total: Tensor
    supervised: Tensor
    density: Tensor
    edge: Tensor


class CombinedExudateLoss(MaskLoss):
    """A supervised loss on the logits plus the two contrastive terms on the features behind them.

        total = supervised + alpha density + beta edge

    The weights are the paper's unless given; on IDRiD they lowered F1 (docs/results.md), where weak_edge() did not.

    Args:
        alpha: weight of the density term, finite and >= 0; 0 skips its work. May be set between steps.
        beta: weight of the edge term, likewise.
        supervised: called as supervised(logits, target), gives a scalar; None is binary cross-entropy with logits,
            the mean over valid pixels. It gets the target as it is, ignored values too; a warning says once
            if it has a gradient at ignored pixels (on CUDA the first batch alone is looked at).
        density: None is PatchDensityContrastLoss(ignore_index=ignore_index).
        edge: None is PatchEdgeContrastLoss(ignore_index=ignore_index).
        ignore_index: target value of pixels that count for nothing in the default parts, neither 0 nor 1. With 255,
            the lesions of a 0/255 mask would all be ignored.
        features: the model, which is then tapped, or a FeatureTap on it, which gives the features; features given to
            a call win over it. The tap stands as the attribute tap, which copies of the criterion lose; it can be set
            to a model or a FeatureTap.

    Shape:
        - logits: (B, K, H, W), floating.
        - target: (B, K, H, W) of 0, 1 and ignore_index; bool, integer or floating.
        - features: (B, C, h, w), floating, C >= 2, any h and w. Not needed where alpha and beta are 0.

        Returns (), float32 (float64 where logits or features are).

    Raises:
        TypeError, ValueError: an option or a tensor is not as above, no features are given, the logits do not belong
            to those of the tap as far as the autograd graph tells, or a part's ignore_index contradicts this one's.
            The target's values are checked at every call on the CPU, at the first call on CUDA, and never in compiled
            code.
        RuntimeError: the tap has nothing to give.

    Example:
        >>> logits = torch.randn(2, 1, 64, 64, requires_grad=True)
        >>> features = torch.rand(2, 8, 32, 32, requires_grad=True)
        >>> target = torch.zeros(2, 1, 64, 64)
        >>> target[:, :, 20:40, 20:40] = 1
        >>> criterion = CombinedExudateLoss()
        >>> loss = criterion(logits, target, features)
        >>> loss.backward()
        >>> criterion.terms(logits, target, features)._fields
        ('total', 'supervised', 'density', 'edge')

    Reference:
        Tang et al. 2023, arXiv 2302.11517: alpha = 0.02 and beta = 0.1.
    """

    _learning_seen = False  # of the class, for earlier pickles

    def __init__(
        self,
        alpha: float = 0.02,
        beta: float = 0.1,
        *,
        supervised: Callable[[Tensor, Tensor], Tensor] | None = None,
        density: PatchDensityContrastLoss | None = None,
        edge: PatchEdgeContrastLoss | None = None,
        ignore_index: int | None = None,
        features: FeatureTap | nn.Module | None = None,
    ) -> None:
        super().__init__(ignore_index)
        for name, weight in (("alpha", alpha), ("beta", beta)):
            _checks.check_number(name, weight, 0)  # before nn.Module takes a module given by mistake for a part
        self.alpha = alpha
        self.beta = beta
        self.supervised = supervised
        self.density = PatchDensityContrastLoss(ignore_index=ignore_index) if density is None else density
        self.edge = PatchEdgeContrastLoss(ignore_index=ignore_index) if edge is None else edge
        self.tap: FeatureTap | None = features  # type: ignore[assignment] # __setattr__ taps a model
        self._check_changed_options()

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would take a model for a part of the criterion.
        super().__setattr__(name, FeatureTap(value) if name == "tap" and isinstance(value, nn.Module) else value)

    def _check_options(self) -> None:
        super()._check_options()
        supervised, tap = self.supervised, self.tap
        if supervised is not None and (isinstance(supervised, type) or not callable(supervised)):
            raise TypeError(f"supervised must be None or callable as (logits, target), got {supervised!r}")
        if tap is not None and not isinstance(tap, FeatureTap):
            raise TypeError(
                f"features must be None, a model or a FeatureTap, got {type(tap).__name__}; give a tensor of features "
                "to each call instead"
            )

    @classmethod
    def hecl(
        cls,
        *,
        supervised: Callable[[Tensor, Tensor], Tensor] | None = None,
        ignore_index: int | None = None,
        features: FeatureTap | nn.Module | None = None,
    ) -> "Self":
        """The criterion with the options of the authors' published code: supervised + 0.01 (density + edge).

        Density: 5 x 5 patches, dense from a lesion fraction of 0.3; the 3 densest against the 3 sparsest of the batch.
        Edge: footprint "cross" in each patch alone, inner and outer radius 2 in dense patches, 1 and 5 in sparse ones;
        one inner and one outer embedding an image.

        Args:
            supervised: as in the constructor.
            ignore_index: as in the constructor.
            features: as in the constructor.

        Returns:
            The criterion, whose parts show its options and whose weights can be set.

        Raises:
            TypeError, ValueError: as the constructor.

        Example:
            >>> CombinedExudateLoss.hecl().density  # doctest: +ELLIPSIS
            PatchDensityContrastLoss(num_patches=5, temperature=0.05, contrast='nt_xent', ..., select=3)

        Reference:
            Tang et al. 2024, arXiv 2302.11517v2, by their code; docs/method.md tells where it and the text differ.
        """
        from_0_3 = math.nextafter(0.3, 0)  # "at least 0.3", said with "above"
        density = PatchDensityContrastLoss(num_patches=5, threshold=from_0_3, select=3, ignore_index=ignore_index)
        edge = PatchEdgeContrastLoss(
            num_patches=5,
            inner_radius=(1, 2),
            outer_radius=(5, 2),
            footprint="cross",
            isolate_patches=True,
            scope="image",
            density_threshold=from_0_3,
            ignore_index=ignore_index,
        )
        return cls(
            0.01, 0.01, supervised=supervised, density=density, edge=edge, ignore_index=ignore_index, features=features
        )

    @classmethod
    def weak_edge(
        cls,
        *,
        supervised: Callable[[Tensor, Tensor], Tensor] | None = None,
        ignore_index: int | None = None,
        features: FeatureTap | nn.Module | None = None,
    ) -> "Self":
        """The criterion with the edge term alone, at a fiftieth of the paper's weight: supervised + 0.002 edge.

        What it gained and did not gain on IDRiD is in docs/results.md, questions e and k; beside Dice + BCE or Tversky
        beta = 0.02, rising, gained more (question t). The weight suits networks whose features are of the scale of
        those there, and docs/setting.md tells how to find it for others.

        Args:
            supervised: as in the constructor.
            ignore_index: as in the constructor.
            features: as in the constructor.

        Returns:
            The criterion, whose parts show its options and whose weights can be set.

        Raises:
            TypeError, ValueError: as the constructor.

        Example:
            >>> criterion = CombinedExudateLoss.weak_edge()
            >>> criterion.alpha, criterion.beta
            (0.0, 0.002)
        """
        return cls(0.0, 0.002, supervised=supervised, ignore_index=ignore_index, features=features)

    @property
    def alpha(self) -> float:
        """Weight of the density term."""
        return float(self._alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        _checks.check_number("alpha", value, 0)
        # The compiler specialises on a float and would compile again for the next; a tensor it takes as an input.
        self._alpha, self._uses_density = torch.tensor(value, dtype=torch.float64, device="cpu"), bool(value)

    @property
    def beta(self) -> float:
        """Weight of the edge term."""
        return float(self._beta)

    @beta.setter
    def beta(self, value: float) -> None:
        _checks.check_number("beta", value, 0)
        self._beta, self._uses_edge = torch.tensor(value, dtype=torch.float64, device="cpu"), bool(value)

    def forward(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> Tensor:
        """The weighted total; arguments as under Shape."""
        return self.terms(logits, target, features).total

    def terms(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> LossTerms:
        """The weighted total and its three parts, density and edge unweighted, 0 where skipped; for logs.

        Args, Raises: as a call of the criterion; it takes the place of one, with total as what to differentiate.
        """
        self._check_changed_options()
        _checks.check_target(target)
        _checks.check_logits(logits, target)
        terms = [term for term, used in ((self.density, self._uses_density), (self.edge, self._uses_edge)) if used]
        features = self._found(features, logits, needed=bool(terms))
        if features is not None:
            _checks.check_features(features, target)
        # A subclass with a forward of its own checks and computes for itself.
        ours = all(type(term).forward is PatchContrastLoss.forward for term in terms)
        indices = [self.ignore_index] * (self.supervised is None) + [term.ignore_index for term in terms if ours]
        mask = plain(target)
        known = self._check_values(mask, indices)
        if self.supervised is None:
            with full_precision(mask):
                supervised = binary_cross_entropy(plain(logits), mask, self.ignore_index, known=known)
        else:
            supervised = self._given_supervised(self.supervised, logits, target)
        if features is None:
            losses = []
        elif ours:
            losses = term_losses(terms, plain(features), mask)
        else:
            losses = [term(features, target) for term in terms]
        zero = supervised.new_zeros(())
        density = losses[0] if self._uses_density else zero
        edge = losses[-1] if self._uses_edge else zero
        alpha, beta = self._alpha.to(density.dtype), self._beta.to(edge.dtype)
        return LossTerms(supervised + alpha * density + beta * edge, supervised, density, edge)

    def extra_repr(self) -> str:
        """What repr shows beside the parts."""
        shown = f"alpha={self.alpha}, beta={self.beta}, ignore_index={self.ignore_index}, features={self.tap}"
        if self.supervised is None or isinstance(self.supervised, nn.Module):
            return shown
        return f"{shown}, supervised={self.supervised!r}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"tap": None}

    def _check_changed_options(self) -> None:
        super()._check_changed_options()
        for name, part, kind in (
            ("density", self.density, PatchDensityContrastLoss),
            ("edge", self.edge, PatchEdgeContrastLoss),
        ):
            _checks.check_part(name, part, kind, self.ignore_index)
            part._check_changed_options()

    def _found(self, features: Tensor | None, logits: Tensor, *, needed: bool) -> Tensor | None:
        """The features for the terms, those given or the tap's; None where they are not needed."""
        if features is None and self.tap is not None:
            if needed:
                return taken_features(self.tap, logits)
            self.tap.drop()
        if features is None and needed:
            raise ValueError(
                "features must be given, as criterion(logits, target, features) or by "
                "CombinedExudateLoss(features=model), got None; copies of a criterion are untapped: set "
                "criterion.tap = model"
            )
        if features is not None and needed:
            check_gradient(features, logits)
        return features if needed else None

    def _given_supervised(self, supervised: Callable[..., Any], logits: Tensor, target: Tensor) -> Tensor:
        if not self._learning_seen and _checks.may_read(target):
            logits = watched(logits, plain(target), self.ignore_index, self._see_learning)
        loss = supervised(logits, target)
        if not isinstance(loss, Tensor):
            raise TypeError(f"supervised must return a scalar tensor, got {type(loss).__name__}")
        if loss.dim():
            raise ValueError(f"supervised must return a scalar, got {tuple(loss.shape)}; give it reduction='mean'")
        loss = plain(loss)
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    def _see_learning(self, learns: bool) -> None:
        """Warn once: of the first ignored pixels on the CPU; elsewhere, where looking waits, of the first batch."""
        if learns and not self._learning_seen:
            warnings.warn(
                f"supervised has a gradient at ignored pixels (target == {self.ignore_index}), so it seems not to know "
                "the value; tell it, often by ignore_index=, or, if it is to learn from these pixels, give "
                "ignore_index to density and edge alone",
                stacklevel=2,
            )
        self._learning_seen = True
