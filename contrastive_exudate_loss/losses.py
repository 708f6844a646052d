"""The three losses: check what comes in, compose the parts, weigh the terms."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from contrastive_exudate_loss import _checks, fused, pull
from contrastive_exudate_loss._misuse import CONFIRMED, LOOKS, suspicions
from contrastive_exudate_loss._supervised import binary_cross_entropy, cross_entropy, given_loss, watched
from contrastive_exudate_loss._terms import (
    Candidates,
    PatchContrastLoss,
    full_precision,
    losses_with_cross_entropy,
    plain,
    term_losses,
)
from contrastive_exudate_loss._weights import WeightedLoss
from contrastive_exudate_loss.distributed import rank_and_count
from contrastive_exudate_loss.features import FeatureTap
from contrastive_exudate_loss.labels import flat_index, masks_of
from contrastive_exudate_loss.masks import Regions, density_regions, edge_regions
from contrastive_exudate_loss.morphology import FOOTPRINTS
from contrastive_exudate_loss.origin import check_gradient, taken_features
from contrastive_exudate_loss.pull import Pull


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
        select: "all", or an int k >= 2: for each class, only the k densest dense and the k sparsest sparse patches
            of the batch.
        max_patches: for each class and label, at most that many (>= 2) random patches, drawn anew on each call; not
            with select.
        ignore_index: target value of pixels that count for nothing, neither 0 nor 1. A patch without valid pixels
            takes no part. With 255, the lesions of a 0/255 mask would all be ignored.
        gather_distributed: contrast the patches of all processes of torch.distributed's default group. The value, and
            the gradients as DistributedDataParallel averages them, are then those of one process with the whole
            batch. Each process must call the loss, with the same K and C. select acts on all patches, max_patches on
            those of each process. Nothing is gathered under torch.no_grad().

    Shape:
        - features: (B, C, h, w), floating, C >= 2; any h and w (pixel (i, j) reads (floor(i h / H), floor(j w / W))).
        - target: (B, K, H, W) of 0, 1 and ignore_index; bool, integer or floating.

        Half-precision features are pooled and contrasted in float32, even under autocast; matrix products follow
        torch.set_float32_matmul_precision. A NaN or infinity in the features, even at ignored pixels, may give NaN.
        Returns (), float32 (float64 for float64 features): 0, with zero gradients, if no patch is dense, none is
        sparse, or neither kind has two.

    Raises:
        TypeError, ValueError: an option or a tensor is not as above, or processes that gather disagree. The target's
            values are checked on every call on the CPU, elsewhere on the first call, and never in compiled code.

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
        contrast: Literal["nt_xent", "sup_con"] = "nt_xent",
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

    def _selected_count(self) -> int | None:
        return None if isinstance(self.select, str) else self.select

    def _for_kernels(self) -> fused.Density:
        at_random = self.max_patches is not None
        most = self.max_patches if at_random else self._selected_count()
        return fused.Density(self.threshold, self.temperature, most or 0, at_random)

    def _regions(self, target: Tensor, sides: tuple[int, int]) -> Regions:
        return density_regions(target, sides, self.ignore_index)

    def _candidates(self, sums: Tensor, present: Tensor, regions: Regions) -> Sequence[Candidates]:
        pooled = sums, present, cast(Tensor, regions.fraction)
        # (B, K, gh, gw) to (K, M)
        vectors, present, fraction = (tensor.movedim(1, 0).flatten(1, 3) for tensor in pooled)
        dense = fraction > self.threshold
        labels = dense.to(present.device)
        if self._selected_count() is None:
            return [Candidates(*own) for own in zip(vectors, labels, present, strict=True)]
        densest_and_sparsest_first = torch.where(dense, -fraction, fraction)
        return [Candidates(*own) for own in zip(vectors, labels, present, densest_and_sparsest_first, strict=True)]


class PatchEdgeContrastLoss(PatchContrastLoss):
    """Contrast of the mean features just inside lesion contours against those just outside.

    The inner band holds the lesion pixels within inner_radius of background, the outer band the background pixels
    within outer_radius of a lesion. The image border is no contour, and ignored pixels are neither lesion nor
    background. Each band gives one embedding per patch, and none where it is empty.
    Each class of the target has its own contrast, over all images of the batch, and the classes are averaged.

    Args:
        patch_size: side of a patch in target pixels, >= 1; None means 16 unless num_patches is given.
        num_patches: n >= 1, instead of patch_size: sides ceil(H / n) and ceil(W / n), so at most n patches per axis.
        inner_radius: in target pixels, >= 1; with density_threshold also a pair (for sparse, for dense patches).
        outer_radius: likewise.
        footprint: what "within a radius" means: "square" (Chebyshev distance) or "cross" (Manhattan distance).
        isolate_patches: cut each patch out first. Its outside, and the image's, counts as background for the inner
            band, and a patch whose valid pixels are all lesion or all background has no contour.
        scope: "patch" (one inner and one outer embedding per patch) or "image" (one of each per image).
        density_threshold: lesion fraction above which a patch is dense, 0 <= threshold < 1; each pixel then has the
            radius of its patch.
        temperature: divides the cosine similarities, >= 0.001.
        contrast: "nt_xent" (mean over positive pairs) or "sup_con" (Khosla et al., mean over anchors).
        max_patches: for each class and label, at most that many (>= 2) random embeddings, drawn anew on each call.
        ignore_index: target value of pixels that count for nothing, neither 0 nor 1. With 255, the lesions of a
            0/255 mask would all be ignored.
        gather_distributed: contrast the bands of all processes of torch.distributed's default group. The value, and
            the gradients as DistributedDataParallel averages them, are then those of one process with the whole
            batch. Each process must call the loss, with the same K and C. max_patches acts on the bands of each
            process. Nothing is gathered under torch.no_grad().

    Shape:
        - features: (B, C, h, w), floating, C >= 2; any h and w (pixel (i, j) reads (floor(i h / H), floor(j w / W))).
        - target: (B, K, H, W) of 0, 1 and ignore_index; bool, integer or floating.

        Half-precision features are pooled and contrasted in float32, even under autocast; matrix products follow
        torch.set_float32_matmul_precision. A NaN or infinity in the features, even at ignored pixels, may give NaN.
        Returns (), float32 (float64 for float64 features): 0, with zero gradients, if there is no contour or neither
        kind of band has two embeddings.

    Raises:
        TypeError, ValueError: an option or a tensor is not as above, or processes that gather disagree. The target's
            values are checked on every call on the CPU, elsewhere on the first call, and never in compiled code.

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
        footprint: Literal["square", "cross"] = "square",
        isolate_patches: bool = False,
        scope: Literal["patch", "image"] = "patch",
        density_threshold: float | None = None,
        temperature: float = 0.05,
        contrast: Literal["nt_xent", "sup_con"] = "nt_xent",
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

    def _for_kernels(self) -> fused.Edge:
        return fused.Edge(
            *self._radii(),
            cross=self.footprint == "cross",
            isolate=self.isolate_patches,
            threshold=1.0 if self.density_threshold is None else self.density_threshold,  # no fraction is above 1
            temperature=self.temperature,
            per_image=self.scope == "image",
            most=self.max_patches or 0,
        )

    def _radii(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the inner and the outer band, in sparse and in dense patches."""
        inner, outer = ((r, r) if isinstance(r, int) else r for r in (self.inner_radius, self.outer_radius))
        return inner, outer

    def _regions(self, target: Tensor, sides: tuple[int, int]) -> Regions:
        inner, outer = self._radii()
        options = self.footprint, self.isolate_patches, self.density_threshold, self.ignore_index
        return edge_regions(target, sides, inner, outer, *options)

    def _candidates(self, sums: Tensor, present: Tensor, regions: Regions) -> Sequence[Candidates]:
        if self.scope == "image":
            sums, present = sums.sum((2, 3), keepdim=True), present.any((2, 3), keepdim=True)
        # (B, 2 K, gh, gw) to (K, 2, B, gh, gw): of each class all inner embeddings, then all outer ones.
        bands = (2, present.shape[1] // 2)
        vectors, present = (tensor.unflatten(1, bands).movedim((2, 1), (0, 1)) for tensor in (sums, present))
        labels = torch.zeros_like(present)
        labels[:, 0].fill_(True)
        flat = vectors.flatten(1, 4), labels.flatten(1), present.flatten(1)
        return [Candidates(*own) for own in zip(*flat, strict=True)]


class LossTerms(NamedTuple):
    """What CombinedExudateLoss.terms returns: total = supervised + alpha density + beta edge, each a scalar tensor.

    density and edge are unweighted, 0 if skipped; alpha and beta are the weights that were used, without gradient.
    """

    total: Tensor
    supervised: Tensor
    density: Tensor
    edge: Tensor
    alpha: Tensor
    beta: Tensor


class CombinedExudateLoss(WeightedLoss):
    """A supervised loss on the logits plus the two contrastive terms on the features behind them.

        total = supervised + alpha density + beta edge

    The default uses the edge term alone. The criterion sets its weight, a Pull, so that the term pulls at the features
    twice as hard as the supervised loss. paper() has the paper's weights.

    Args:
        alpha: weight of the density term: a finite number >= 0, or a Pull. 0 skips the term. May be set between steps.
        beta: weight of the edge term, likewise.
        supervised: called as supervised(logits, target), returns a scalar. None is binary cross-entropy with logits, or
            cross-entropy with classes, the mean over valid pixels. A given loss gets the target as it is, ignored
            values included; one warning says if it has a gradient at ignored pixels (on CUDA only the first batch is
            looked at).
        density: None is PatchDensityContrastLoss(ignore_index=ignore_index).
        edge: None is PatchEdgeContrastLoss(ignore_index=ignore_index).
        classes: distinct integers >= 0, the classes that are lesions, if the target is an index mask; None if it is
            masks.
        ignore_index: target value of pixels that count for nothing in the default parts, neither 0 nor 1. With 255,
            the lesions of a 0/255 mask would all be ignored.
        features: the model, which is then tapped, or a FeatureTap on it, from which the criterion takes the features.
            Features given to a call take precedence. The attribute tap holds the tap, and may be set to a model or a
            FeatureTap; copies of the criterion lose it.

    Shape:
        - logits: (B, K, H, W), floating; with classes, any number of channels, for cross-entropy one per class.
        - target: (B, K, H, W) of 0, 1 and ignore_index; bool, integer or floating; with classes an index mask,
          (B, H, W) or (B, 1, H, W), integer.
        - features: (B, C, h, w), floating, C >= 2, any h and w. Not needed if alpha and beta are 0.

        Returns (), float32 (float64 if logits or features are).

    Raises:
        TypeError, ValueError: an option or a tensor is not as above, no features are given, the autograd graph shows
            that the logits do not belong to the tap's features, a Pull has nothing to measure, or a part's
            ignore_index contradicts the criterion's.
            The target's values are checked on every call on the CPU, elsewhere on the first call, and never in
            compiled code; not at all where supervised is given and no term is used.
        RuntimeError: the tap has no features.

    Example:
        >>> features = torch.rand(2, 8, 64, 64, requires_grad=True)
        >>> logits = nn.Conv2d(8, 1, 1)(features)
        >>> target = torch.zeros(2, 1, 64, 64)
        >>> target[:, :, 20:40, 20:40] = 1
        >>> criterion = CombinedExudateLoss()
        >>> terms = criterion.terms(logits, target, features)  # or criterion(...), which gives the total alone
        >>> terms.total.backward()

    Reference:
        Tang et al. 2023, arXiv 2302.11517.
    """

    # Class attributes, which pickles of earlier versions lack.
    _learning_seen = False
    _looks = LOOKS
    _doubts: tuple[str, ...] = CONFIRMED
    _warned: tuple[str, ...] = ()
    classes: tuple[int, ...] | None = None

    def __init__(
        self,
        alpha: float | Pull = 0.0,
        beta: float | Pull = Pull(2.0),
        *,
        supervised: Callable[[Tensor, Tensor], Any] | None = None,
        density: PatchDensityContrastLoss | None = None,
        edge: PatchEdgeContrastLoss | None = None,
        classes: Sequence[int] | None = None,
        ignore_index: int | None = None,
        features: FeatureTap | nn.Module | None = None,
    ) -> None:
        super().__init__(alpha, beta, ignore_index)
        self.supervised = supervised
        self.classes = _checks.plain_option(classes)
        self.density = PatchDensityContrastLoss(ignore_index=ignore_index) if density is None else density
        self.edge = PatchEdgeContrastLoss(ignore_index=ignore_index) if edge is None else edge
        self.tap: FeatureTap | None = features  # type: ignore[assignment]  # __setattr__ taps a model
        self._check_changed_options()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "supervised" and not isinstance(value, nn.Module):
            self._modules.pop(name, None)  # or nn.Module refuses a function where a module was
        super().__setattr__(name, value)

    def _check_options(self) -> None:
        super()._check_options()
        supervised, tap = self.supervised, self.tap
        if self.classes is not None:
            _checks.check_classes(self.classes, self.ignore_index)
        if isinstance(supervised, type):
            name = supervised.__name__
            raise TypeError(
                f"supervised must be None or callable as (logits, target), got the class {name}; give {name}()"
            )
        if supervised is not None and not callable(supervised):
            raise TypeError(f"supervised must be None or callable as (logits, target), got {supervised!r}")
        if tap is not None and not isinstance(tap, FeatureTap):
            raise TypeError(
                f"features must be None, a model or a FeatureTap, got {type(tap).__name__}; give a tensor of features "
                "to each call instead"
            )

    @classmethod
    def paper(
        cls,
        *,
        supervised: Callable[[Tensor, Tensor], Any] | None = None,
        classes: Sequence[int] | None = None,
        ignore_index: int | None = None,
        features: FeatureTap | nn.Module | None = None,
    ) -> "CombinedExudateLoss":
        """The criterion with the weights of the paper's first version: supervised + 0.02 density + 0.1 edge.

        On IDRiD they lowered F1 in every run (docs/results.md).

        Args:
            supervised: as in the constructor.
            classes: as in the constructor.
            ignore_index: as in the constructor.
            features: as in the constructor.

        Returns:
            The criterion; its weights can be set.

        Raises:
            TypeError, ValueError: as the constructor.

        Example:
            >>> criterion = CombinedExudateLoss.paper()
            >>> criterion.alpha, criterion.beta
            (0.02, 0.1)

        Reference:
            Tang et al. 2023, arXiv 2302.11517v1.
        """
        return cls(0.02, 0.1, supervised=supervised, classes=classes, ignore_index=ignore_index, features=features)

    @classmethod
    def hecl(
        cls,
        *,
        supervised: Callable[[Tensor, Tensor], Any] | None = None,
        classes: Sequence[int] | None = None,
        ignore_index: int | None = None,
        features: FeatureTap | nn.Module | None = None,
    ) -> "CombinedExudateLoss":
        """The criterion with the options of the authors' published code: supervised + 0.01 (density + edge).

        Density: 5 x 5 patches, dense from a lesion fraction of 0.3; the 3 densest against the 3 sparsest of the batch.
        Edge: footprint "cross" in isolated patches, inner and outer radius 2 in dense patches, 1 and 5 in sparse ones;
        one inner and one outer embedding per image.

        Args:
            supervised: as in the constructor.
            classes: as in the constructor.
            ignore_index: as in the constructor.
            features: as in the constructor.

        Returns:
            The criterion; its parts show the options, and its weights can be set.

        Raises:
            TypeError, ValueError: as the constructor.

        Example:
            >>> CombinedExudateLoss.hecl().density  # doctest: +ELLIPSIS
            PatchDensityContrastLoss(num_patches=5, temperature=0.05, contrast='nt_xent', ..., select=3)

        Reference:
            Tang et al. 2024, arXiv 2302.11517v2, after their code; docs/method.md says where it and the text differ.
        """
        from_0_3 = math.nextafter(0.3, 0)  # "at least 0.3", expressed as "above"
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
            0.01,
            0.01,
            supervised=supervised,
            density=density,
            edge=edge,
            classes=classes,
            ignore_index=ignore_index,
            features=features,
        )

    @classmethod
    def weak_edge(
        cls,
        *,
        supervised: Callable[[Tensor, Tensor], Any] | None = None,
        classes: Sequence[int] | None = None,
        ignore_index: int | None = None,
        features: FeatureTap | nn.Module | None = None,
    ) -> "CombinedExudateLoss":
        """The criterion with the edge term alone, at a fiftieth of the paper's weight: supervised + 0.002 edge.

        Deprecated: CombinedExudateLoss() sets the weight itself.

        Args:
            supervised: as in the constructor.
            classes: as in the constructor.
            ignore_index: as in the constructor.
            features: as in the constructor.

        Returns:
            The criterion; its parts show the options, and its weights can be set.

        Raises:
            TypeError, ValueError: as the constructor.

        Example:
            >>> CombinedExudateLoss(beta=0.002).beta  # the same without the warning
            0.002
        """
        warnings.warn(
            "CombinedExudateLoss.weak_edge() will be removed in the next version; use CombinedExudateLoss(...), which "
            "sets the edge term's weight itself, or CombinedExudateLoss(beta=0.002, ...), which is the same as this",
            FutureWarning,
            stacklevel=2,
        )
        return cls(0.0, 0.002, supervised=supervised, classes=classes, ignore_index=ignore_index, features=features)

    def forward(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> Tensor:
        """The weighted total; arguments as under Shape."""
        return self.terms(logits, target, features).total

    def terms(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> LossTerms:
        """The weighted total and its three parts, for logs; density and edge are unweighted, 0 if skipped.

        Call it instead of the criterion, and differentiate total. Args, Raises: as for a call of the criterion.
        """
        self._check_changed_options()
        finest, given = self._finest(logits, target)
        plain_logits, plain_target = plain(finest), plain(given)
        terms = [term for term, used in ((self.density, self._uses_density), (self.edge, self._uses_edge)) if used]
        is_tapped = features is None
        features = self._term_features(features, finest, needed=bool(terms))
        if features is not None:
            _checks.check_features(features, given)
            if not is_tapped:
                check_gradient(features, finest)
        # A subclass with a forward of its own checks and computes by itself.
        ours = all(type(term).forward is PatchContrastLoss.forward for term in terms)
        if features is not None and ours:
            at_once = self._all_at_once(plain_logits, plain_target, plain(features), terms)
            if at_once is not None:
                return at_once
        own = terms if ours else []
        if self.supervised is None:
            supervised = self._default_supervised(plain_logits, plain_target, own)
        else:
            if self.classes is None and own:
                self._check_values(plain_target, [term.ignore_index for term in own])
            supervised = self._given_supervised(self.supervised, logits, target, finest, given)
        mask, index = plain_target, None
        if self.classes is not None:
            mask, index = masks_of(plain_target, self.classes, self.ignore_index), plain_target
        self._look_for_misuse(plain_logits, mask, index)
        if features is None:
            terms = []
        else:
            self._look_at_gradient(features, supervised)
            features = plain(features) if ours else features
        features_of_terms = [] if features is None else [features] * len(terms)
        weights = None
        if features is not None and self._has_pull():
            over_ranks = any(term.gather_distributed for term in terms) and rank_and_count()[1] > 1
            temperatures = self.density.temperature, self.edge.temperature
            weights, features_of_terms = self._pulled(
                supervised, plain(features), temperatures, is_tapped=is_tapped, over_ranks=over_ranks
            )
        if ours:
            losses = term_losses(terms, features_of_terms, mask)
        else:
            losses = [term(measured, mask) for term, measured in zip(terms, features_of_terms, strict=True)]
        zero = supervised.new_zeros(())
        density = losses[0] if losses and self._uses_density else zero
        edge = losses[-1] if losses and self._uses_edge else zero
        if weights is None:
            # If there is a Pull here, no term was computed: the tap does not know its layer yet.
            alpha, beta = (
                zero if isinstance(weight, Pull) else weight.to(term.dtype)
                for weight, term in ((self._alpha, density), (self._beta, edge))
            )
            total = supervised + alpha * density + beta * edge
        else:
            total = pull.total(supervised, density, edge, weights, cast("dict[str, Tensor]", self._pull_state))
            alpha, beta = weights.unbind()
        return LossTerms(total, supervised, density, edge, alpha, beta)

    def extra_repr(self) -> str:
        """What repr shows besides the parts."""
        shown = f"alpha={self.alpha}, beta={self.beta}, ignore_index={self.ignore_index}, features={self.tap}"
        if self.classes is not None:
            shown += f", classes={self.classes}"
        if self.supervised is None or isinstance(self.supervised, nn.Module):
            return shown
        return f"{shown}, supervised={self.supervised!r}"

    def _check_changed_options(self) -> None:
        super()._check_changed_options()
        for name, part, kind in (
            ("density", self.density, PatchDensityContrastLoss),
            ("edge", self.edge, PatchEdgeContrastLoss),
        ):
            _checks.check_part(name, part, kind, self.ignore_index, always=self.classes is not None)
            part._check_changed_options()
        self._measure_at_the_tap()

    def _all_at_once(
        self, logits: Tensor, target: Tensor, features: Tensor, terms: Sequence[PatchContrastLoss]
    ) -> LossTerms | None:
        """All of it, where one call of the kernels does that: cross-entropy of masks, and weights that are numbers."""
        alpha, beta = self._alpha, self._beta
        given = self.supervised is not None or self.classes is not None
        # Asked before a weight is read, which would break a compiled graph.
        if given or not (terms and fused.switched_on(features)) or isinstance(alpha, Pull) or isinstance(beta, Pull):
            return None
        weights = float(alpha), float(beta)
        found = losses_with_cross_entropy(terms, features, logits, target, self.ignore_index, weights)
        if found is None:
            return None
        self._check_values(target, [self.ignore_index, *(term.ignore_index for term in terms)])
        self._look_for_misuse(logits, target)
        self._look_at_gradient(features, logits)
        total, supervised, *losses = found
        density = losses[0] if self._uses_density else total.new_zeros(())
        edge = losses[-1] if self._uses_edge else total.new_zeros(())
        return LossTerms(total, supervised, density, edge, alpha.to(total.dtype), beta.to(total.dtype))

    def _finest(self, logits: Any, target: Any) -> tuple[Tensor, Tensor]:
        """The logits and the target that the terms look at, checked: the first of several levels."""
        if isinstance(logits, (list, tuple)):
            if not logits:
                raise ValueError("logits must hold the levels of deep supervision, the finest first, got none")
            sizes = [tuple(level.shape[2:]) for level in logits if isinstance(level, Tensor) and level.dim() == 4]
            if len(sizes) < len(logits):
                got = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in logits)
                raise ValueError(
                    f"logits must be a tensor, or the levels of deep supervision, each (B, K, h, w), got a "
                    f"{type(logits).__name__} of {got}; if the model returns more than its logits, give the logits "
                    "alone, such as output[0]"
                )
            if self.supervised is None:
                raise ValueError(
                    "supervised must be given if logits are the levels of deep supervision, got None; give the loss "
                    "that weighs the levels, such as MONAI's DeepSupervisionLoss; if the model returns more than its "
                    "logits, give the logits alone, such as output[0]"
                )
            if math.prod(sizes[0]) < max(map(math.prod, sizes)):
                raise ValueError(
                    f"logits must hold the levels of deep supervision, the finest first, got sizes {sizes}; give "
                    "logits[::-1], and the target likewise where it is a list"
                )
            logits = logits[0]
            if isinstance(target, (list, tuple)) and target and isinstance(target[0], Tensor):
                target = target[0]
        elif isinstance(target, (list, tuple)) and target and all(isinstance(mask, Tensor) for mask in target):
            raise TypeError(
                "target may be a list only if logits are a list too (deep supervision), got a list of "
                f"{len(target)} tensors; if they are the masks of the images, give torch.stack(target)"
            )
        if self.classes is None:
            _checks.check_target(target)
            _checks.check_logits(logits, target)
        else:
            _checks.check_index(target, "target")
            _checks.check_class_logits(logits, target)
        return logits, target

    def _default_supervised(self, logits: Tensor, target: Tensor, terms: Sequence[PatchContrastLoss]) -> Tensor:
        """Cross-entropy with classes, else binary cross-entropy; also checks the target's values for the terms."""
        if self.classes is None:
            known = self._check_values(target, [self.ignore_index, *(term.ignore_index for term in terms)])
            with full_precision(target):
                return binary_cross_entropy(logits, target, self.ignore_index, known=known)
        index = flat_index(target)
        if self.classes and max(self.classes) >= logits.shape[1]:
            remedy = "give the network as many channels as there are classes, the background included"
            if logits.shape[1] == 1 and len(self.classes) == 1:
                remedy += f"; or leave classes out and give the mask (target == {self.classes[0]}), as (B, 1, H, W)"
            raise ValueError(
                f"classes must be below the number of logits' channels, {logits.shape[1]}, got {self.classes}; {remedy}"
            )
        if self._reads(target):
            _checks.check_index_values(index, logits.shape[1], self.ignore_index)
            self._values_checked = True
        with full_precision(target):
            return cross_entropy(logits, index, self.ignore_index)

    def _term_features(self, features: Tensor | None, logits: Tensor, *, needed: bool) -> Tensor | None:
        """The features for the terms, given or the tap's; None if not needed, or if the tap knows no layer yet."""
        if features is None and self.tap is not None:
            if needed and not (torch.is_grad_enabled() or self.tap.knows_its_layer):
                # Validation before the first training step, such as Lightning's sanity check.
                self._warn(
                    "waits",
                    "the tap finds its layer in the first forward pass with gradients; until then the criterion gives "
                    "the supervised loss alone; to avoid this, name the layer with FeatureTap(model, layer=NAME)",
                )
                return None
            if needed:
                return taken_features(self.tap, logits)
            self.tap.drop()
        elif features is None and needed:
            raise ValueError(
                "features must be given, as criterion(logits, target, features) or with "
                "CombinedExudateLoss(features=model), got None; copies of a criterion are untapped: set "
                "criterion.tap = model"
            )
        return features if needed else None

    def _given_supervised(
        self, supervised: Callable[..., Any], logits: Any, target: Any, finest: Tensor, mask: Tensor
    ) -> Tensor:
        if self.classes is None and not self._learning_seen and _checks.may_read(mask):
            seen = watched(finest, plain(mask), self.ignore_index, self._see_learning)
            logits = type(logits)([seen, *logits[1:]]) if isinstance(logits, (list, tuple)) else seen
        return given_loss(supervised, logits, target, self.ignore_index, of_classes=self.classes is not None)

    def _look_at_gradient(self, features: Tensor, supervised: Tensor) -> None:
        """Warn once if the features have a gradient and the supervised loss, or what it is computed from, has none."""
        if not features.requires_grad or supervised.requires_grad:
            return
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn(
                "no gradient",
                "the supervised loss has no gradient, so it trains nothing; give the logits as the model made them, "
                "not detached, and a loss that is differentiable with respect to them",
            )

    def _look_for_misuse(self, logits: Tensor, mask: Tensor, index: Tensor | None = None) -> None:
        """Warn once of each suspicion; if it may be chance, only when every batch that is looked at shows it."""
        if len(mask) == 1 and self._uses_edge and self.edge.scope == "image" and not self.edge.gather_distributed:
            self._warn(
                "one image",
                "edge has scope='image', as in hecl(), which contrasts the bands of several images, but the batch has "
                "one, so the term is 0; give batches of several images, or scope='patch'",
            )
        if not _checks.may_read(mask) or self._looks == 0:
            return
        found = dict(suspicions(logits, mask, self.ignore_index, index))
        self._looks = self._looks - 1 if mask.is_cpu else 0
        self._doubts = tuple(name for name in self._doubts if name in found and mask.is_cpu)
        for name, sentence in found.items():
            if name not in CONFIRMED or (self._looks == 0 and name in self._doubts):
                self._warn(name, sentence)

    def _warn(self, name: str, sentence: str) -> None:
        if name not in self._warned:
            self._warned = (*self._warned, name)
            _checks.warn(sentence)

    def _see_learning(self, learns: bool, pulls: bool) -> None:
        """Warn once: on the CPU at the first ignored pixels; elsewhere, where looking waits, in the first batch."""
        if learns and not self._learning_seen:
            _checks.warn(
                f"supervised has a gradient at ignored pixels (target == {self.ignore_index}), so it seems not to know "
                "that value; set it there too, often with ignore_index=, or, if supervised should learn from these "
                "pixels, give ignore_index to density and edge alone",
            )
        elif not pulls and not self._learning_seen:
            _checks.warn(
                "supervised has no gradient at any pixel of a batch with lesions and ignored pixels (target == "
                f"{self.ignore_index}), so it trains nothing there; tell it the value, often by ignore_index=, or mark "
                "ignored pixels with a value that it knows, such as 255",
            )
        self._learning_seen = True
