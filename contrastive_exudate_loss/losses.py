"""The three losses: check what comes in, compose the parts, weigh the terms."""

import contextlib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contrastive_exudate_loss import _checks
from contrastive_exudate_loss.contrast import CONTRASTS, best_of_each_label, contrast_loss
from contrastive_exudate_loss.distributed import of_all_ranks, rank_and_count, sum_of_ranks
from contrastive_exudate_loss.features import FeatureTap, check_origin
from contrastive_exudate_loss.morphology import FOOTPRINTS, inner_contour, outer_contour
from contrastive_exudate_loss.patches import (
    at_pixels,
    cut_patches,
    lesion_fraction,
    paste_patches,
    patch_counts,
    patch_sides,
)
from contrastive_exudate_loss.pooling import embeddings, masked_sums

if TYPE_CHECKING:  # Python 3.10 has it not
    from typing import Self


class _MaskLoss(nn.Module):
    """A loss whose target is a mask of 0, 1 and ignore_index."""

    _options: frozenset[str] = frozenset()  # until they are complete, and of earlier pickles

    def __init__(self, ignore_index: int | None) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self._values_checked = False

    def __setattr__(self, name: str, value: Any) -> None:
        """An option that is set later is checked like one that is given."""
        before: Any = getattr(self, name, None)
        super().__setattr__(name, value)
        if name in self._options:
            try:
                self._check_options()
            except (TypeError, ValueError):
                super().__delattr__(name)  # a module lies elsewhere than what it displaced
                super().__setattr__(name, before)
                raise

    def _completed(self) -> None:
        """Check the options, now at the end of a constructor, and from now on."""
        self._check_options()
        own = {*vars(self), *self._modules} - {"training"}
        self._options = frozenset(name for name in own if not name.startswith("_"))

    def _check_options(self) -> None:
        """Raise unless the options as they stand make sense, each by itself and together."""
        _checks.check_ignore_index(self.ignore_index)

    def _check_values(self, target: Tensor) -> bool:
        """Check the target's values: on the CPU every time, elsewhere (it waits for the device) the first time.

        Returns whether they were looked at.
        """
        if torch.compiler.is_compiling() or target.is_meta or self._would_wait(target):
            return False
        _checks.check_target_values(target, self.ignore_index)
        self._values_checked = True
        return True

    def _would_wait(self, target: Tensor) -> bool:
        """Whether reading the target's values would wait for a device once more, or break a graph's capture."""
        once_more = self._values_checked and not target.is_cpu
        return once_more or (target.is_cuda and torch.cuda.is_current_stream_capturing())


class _PatchContrastLoss(_MaskLoss):
    """What the two terms share: their patches, their contrast and the order of the steps."""

    def __init__(
        self,
        patch_size: int | None,
        num_patches: int | None,
        temperature: float,
        contrast: str,
        max_patches: int | None,
        ignore_index: int | None,
        gather_distributed: bool,
    ) -> None:
        super().__init__(ignore_index)
        self.patch_size = 16 if patch_size is None and num_patches is None else patch_size
        self.num_patches = num_patches
        self.temperature = temperature
        self.contrast = contrast
        self.max_patches = max_patches
        self.gather_distributed = gather_distributed

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        """The loss; arguments as under Shape."""
        features, target = self._checked(features, target)
        with _full_precision(target):
            masks, *fraction = self._masks(target)
            sums, counts = masked_sums(features, masks, self._sides(target))
            return self._contrast(sums, counts, *fraction)

    def extra_repr(self) -> str:
        options = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)

    def _check_options(self) -> None:
        super()._check_options()
        if (self.patch_size is None) == (self.num_patches is None):
            raise ValueError(
                f"give patch_size or num_patches, not both, got {self.patch_size!r} and {self.num_patches!r}"
            )
        if self.patch_size is not None:
            _checks.check_integer("patch_size", self.patch_size, 1)
        if self.num_patches is not None:
            _checks.check_integer("num_patches", self.num_patches, 1)
        _checks.check_number("temperature", self.temperature, 1e-3)
        _checks.check_choice("contrast", self.contrast, CONTRASTS)
        if self.max_patches is not None:
            _checks.check_integer("max_patches", self.max_patches, 2)
        _checks.check_flag("gather_distributed", self.gather_distributed)

    def _masks(self, target: Tensor) -> tuple[Tensor, ...]:
        """The masks to pool, (B, T, H, W) bool, and, where labels come of them, the patches' lesion fractions."""
        raise NotImplementedError

    def _contrast(self, sums: Tensor, counts: Tensor, *fraction: Tensor) -> Tensor:
        """The loss of the pooled masks: sums (B, T, gh, gw, C), counts (B, T, gh, gw)."""
        raise NotImplementedError

    def _checked(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        _checks.check_target(target)
        _checks.check_features(features, target)
        target = _plain(target)
        self._check_values(target)
        return _plain(features), target

    def _sides(self, target: Tensor) -> tuple[int, int]:
        return patch_sides(target.shape[2], target.shape[3], self.patch_size, self.num_patches)

    def _class_mean(
        self,
        vectors: Tensor,
        labels: Tensor,
        present: Tensor,
        priority: Tensor | None = None,
        limit: int = 0,
    ) -> Tensor:
        """Mean over the K classes of the contrast of their embeddings, (K, M, C), labels and presence, (K, M).

        With a priority, (K, M), at most limit of each label take part, those of the lowest.
        """
        gathers = self.gather_distributed and torch.is_grad_enabled() and rank_and_count()[1] > 1
        losses = []
        for k in range(len(vectors)):
            vector, label, here = vectors[k], labels[k], present[k]
            order = None if priority is None else priority[k]
            if self.max_patches is not None:
                drawn = torch.randperm(len(vector), device=vector.device)
                index, here = best_of_each_label(drawn, label, here, self.max_patches)
                vector, label = vector[index], label[index]
            if gathers:
                columns = [label[here]] if order is None else [label[here], order[here]]
                vector, label, *orders = of_all_ranks(vector[here], *columns, classes=len(vectors))
                here, order = torch.ones_like(label), orders[0] if orders else None
            if order is not None:
                index, here = best_of_each_label(order, label, here, limit)
                vector, label = vector[index], label[index]
            part, parts = rank_and_count() if gathers and _shares_anchors(vector) else (0, 1)
            loss = contrast_loss(
                vector,
                label,
                here,
                temperature=self.temperature,
                contrast=self.contrast,
                part=part,
                parts=parts,
            )
            losses.append(sum_of_ranks(loss) if parts > 1 else loss)
        return torch.stack(losses).mean()


class PatchDensityContrastLoss(_PatchContrastLoss):
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
        self._completed()

    def _check_options(self) -> None:
        super()._check_options()
        _checks.check_number("threshold", self.threshold, 0, below=1)
        if isinstance(self.select, str):
            _checks.check_choice("select", self.select, ("all",))
        else:
            _checks.check_integer("select", self.select, 2)
            if self.max_patches is not None:
                raise ValueError(f"give select or max_patches, not both, got {self.select} and {self.max_patches}")

    def _masks(self, target: Tensor) -> tuple[Tensor, ...]:
        valid, fraction = _opaque(_density_masks, target)(target, self._sides(target), self.ignore_index)
        return valid, fraction

    def _contrast(self, sums: Tensor, counts: Tensor, *fraction: Tensor) -> Tensor:
        # (B, K, gh, gw) to (K, M)
        vectors, present = (t.movedim(1, 0).flatten(1, 3) for t in (embeddings(sums, counts), counts.bool()))
        (share,) = (t.movedim(1, 0).flatten(1) for t in fraction)
        dense = share > self.threshold
        labels = dense.to(counts.device)
        if isinstance(self.select, str):
            return self._class_mean(vectors, labels, present)
        densest_and_sparsest_first = torch.where(dense, -share, share)
        return self._class_mean(vectors, labels, present, densest_and_sparsest_first, self.select)


class PatchEdgeContrastLoss(_PatchContrastLoss):
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
        self._completed()

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

    def _masks(self, target: Tensor) -> tuple[Tensor, ...]:
        radii = [[r, r] if isinstance(r, int) else list(r) for r in (self.inner_radius, self.outer_radius)]
        options = *radii, self.footprint, self.isolate_patches, self.density_threshold, self.ignore_index
        bands: Tensor = _opaque(_edge_masks, target)(target, self._sides(target), *options)
        return (bands,)

    def _contrast(self, sums: Tensor, counts: Tensor, *fraction: Tensor) -> Tensor:
        if self.scope == "image":
            sums, counts = sums.sum((2, 3), keepdim=True), counts.sum((2, 3), keepdim=True)
        # (B, 2 K, gh, gw) to (K, 2, B, gh, gw): of each class all inner embeddings, then all outer ones.
        pairs = (2, counts.shape[1] // 2)
        vectors = embeddings(sums, counts).unflatten(1, pairs).movedim((2, 1), (0, 1))
        present = counts.bool().unflatten(1, pairs).movedim((2, 1), (0, 1))
        labels = torch.zeros_like(present)
        labels[:, 0] = True
        return self._class_mean(vectors.flatten(1, 4), labels.flatten(1), present.flatten(1))


class LossTerms(NamedTuple):
    """What CombinedExudateLoss.terms gives: total = supervised + alpha density + beta edge, each a scalar tensor."""

    total: Tensor
    supervised: Tensor
    density: Tensor
    edge: Tensor


class CombinedExudateLoss(_MaskLoss):
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
        features: a FeatureTap on the model, which then gives the features; features given to a call win over it.
            It stands as the attribute tap, which copies of the criterion lose and can be given anew.

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
        features: FeatureTap | None = None,
    ) -> None:
        super().__init__(ignore_index)
        for name, weight in (("alpha", alpha), ("beta", beta)):
            _checks.check_number(name, weight, 0)  # before nn.Module takes a module given by mistake for a part
        self.alpha = alpha
        self.beta = beta
        self.supervised = supervised
        self.density = PatchDensityContrastLoss(ignore_index=ignore_index) if density is None else density
        self.edge = PatchEdgeContrastLoss(ignore_index=ignore_index) if edge is None else edge
        self.tap = features
        self._completed()

    def _check_options(self) -> None:
        super()._check_options()
        supervised, tap = self.supervised, self.tap
        if supervised is not None and (isinstance(supervised, type) or not callable(supervised)):
            raise TypeError(f"supervised must be None or callable as (logits, target), got {supervised!r}")
        if tap is not None and not isinstance(tap, FeatureTap):
            raise TypeError(
                f"features must be None or a FeatureTap, got {type(tap).__name__}; give a tensor of features to each "
                "call instead"
            )
        _checks.check_part("density", self.density, PatchDensityContrastLoss, self.ignore_index)
        _checks.check_part("edge", self.edge, PatchEdgeContrastLoss, self.ignore_index)

    @classmethod
    def hecl(
        cls,
        *,
        supervised: Callable[[Tensor, Tensor], Tensor] | None = None,
        ignore_index: int | None = None,
        features: FeatureTap | None = None,
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
        features: FeatureTap | None = None,
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

        Args, Raises: as a call of the criterion, instead of which it stands: total is what to differentiate.
        """
        _checks.check_target(target)
        _checks.check_logits(logits, target)
        used = self._uses_density or self._uses_edge
        if features is None and self.tap is not None:
            features = _tapped(self.tap, logits, used)
        if features is None and used:
            raise ValueError(
                "features must be given, as criterion(logits, target, features) or by "
                "CombinedExudateLoss(features=FeatureTap(model)), got None; copies of a criterion are untapped: set "
                "criterion.tap = FeatureTap(model)"
            )
        supervised = self._supervised(logits, target)
        density = edge = supervised.new_zeros(())
        if features is not None and used:
            density, edge = self._contrasts(features, target, density)
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

    def _supervised(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.supervised is None:
            logits, target = _plain(logits), _plain(target)
            known = self._check_values(target)
            with _full_precision(target):
                return _binary_cross_entropy(logits, target, self.ignore_index, known)
        loss = self.supervised(self._watched(logits, target), target)
        if not isinstance(loss, Tensor):
            raise TypeError(f"supervised must return a scalar tensor, got {type(loss).__name__}")
        if loss.dim():
            raise ValueError(f"supervised must return a scalar, got {tuple(loss.shape)}; give it reduction='mean'")
        loss = _plain(loss)
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    def _watched(self, logits: Tensor, target: Tensor) -> Tensor:
        """The logits, whose gradient will tell whether a given supervised loss learns from ignored pixels."""
        if torch.compiler.is_compiling() or self._learning_seen or target.is_meta or self._would_wait(target):
            return logits
        if not (torch.is_grad_enabled() and logits.requires_grad and _ignores(target, self.ignore_index)):
            return logits
        logits = logits.view_as(logits)
        logits.register_hook(lambda gradient: self._see_learning(_plain(gradient), _plain(target)))
        return logits

    def _see_learning(self, gradient: Tensor, target: Tensor) -> None:
        """Warn once: of the first ignored pixels on the CPU, of those in the first batch where looking takes time."""
        if self._learning_seen:
            return
        ignored = ~_lesion_and_valid(target, self.ignore_index)[1]
        self._learning_seen = not target.is_cpu or bool(ignored.any())
        if bool(gradient[ignored].any()):
            warnings.warn(
                f"supervised has a gradient at ignored pixels (target == {self.ignore_index}), so it seems not to know "
                "the value; tell it, often by ignore_index=, or, if it is to learn from these pixels, give "
                "ignore_index to density and edge alone",
                stacklevel=2,
            )

    def _contrasts(self, features: Tensor, target: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        density, edge = self.density, self.edge
        # A subclass may do as it likes in its forward; the two classes of this package share one pooling.
        ours = type(density) is PatchDensityContrastLoss and type(edge) is PatchEdgeContrastLoss
        both = self._uses_density and self._uses_edge
        if not (ours and both and density._sides(target) == edge._sides(target)):
            return (
                density(features, target) if self._uses_density else zero,
                edge(features, target) if self._uses_edge else zero,
            )
        features, target = density._checked(features, target)
        if edge.ignore_index != density.ignore_index:
            edge._check_values(target)
        with _full_precision(target):
            whole, *fraction = density._masks(target)
            (bands,) = edge._masks(target)
            masks = _opaque(_side_by_side, target)([whole, bands])
            sums, counts = masked_sums(features, masks, edge._sides(target))
            k = target.shape[1]
            return (
                density._contrast(sums[:, :k], counts[:, :k], *fraction),
                edge._contrast(sums[:, k:], counts[:, k:]),
            )


def _shares_anchors(vectors: Tensor) -> bool:
    """Whether each process contrasts its part of the anchors; on the CPU the whole, pairwise, is faster for a few."""
    return not vectors.is_cpu


def _tapped(tap: FeatureTap, logits: Tensor, used: bool) -> Tensor | None:
    if not used:
        tap.drop()
        return None
    features = tap.features
    if torch.is_grad_enabled() and logits.requires_grad and not features.requires_grad:
        raise ValueError(
            f"features from the tap must require a gradient like logits, got features without from {tap}; where the "
            "model has run again without gradients, call the criterion before that; a checkpointed layer needs "
            "torch.utils.checkpoint(..., use_reentrant=False); where all before the last layer is frozen the terms can "
            "train nothing: set alpha = beta = 0; where this is not the layer that makes the logits, give "
            "FeatureTap(model, layer=NAME)"
        )
    if not torch.compiler.is_compiling():
        check_origin(tap, logits)
    return tap.take()


def _binary_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int | None, known: bool) -> Tensor:
    """Mean over the valid pixels of the cross-entropy with logits, in float32 at least; known: target is of 0 and 1."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not _ignores(target, ignore_index):
        lesion = target.to(logits.dtype)
        # What is not 0 is lesion: without a bool, which compiled code on the CPU would keep for the backward, slowly.
        return F.binary_cross_entropy_with_logits(logits, lesion if known else lesion.sign().abs())
    lesion, valid = _lesion_and_valid(target, ignore_index)
    # An ignored logit may be infinite: filled before it enters the formula, it cannot make the gradient NaN.
    logits = logits.masked_fill(~valid, 0)
    total = F.binary_cross_entropy_with_logits(logits, lesion.to(logits.dtype), valid, reduction="sum")
    return total / valid.sum().clamp(min=1)


def _ignores(target: Tensor, ignore_index: int | None) -> bool:
    return ignore_index is not None and _checks.holds(target.dtype, ignore_index)


def _lesion_and_valid(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """(B, K, H, W), bool. Where the values go unchecked, a 0/255 mask still means what it shows."""
    lesion = target.bool()
    if ignore_index is None or not _ignores(target, ignore_index):
        return lesion, torch.ones_like(lesion)
    valid = target != ignore_index
    return lesion & valid, valid


def _fraction(lesion: Tensor, valid: Tensor, sides: Sequence[int]) -> Tensor:
    height, width = sides
    return lesion_fraction(patch_counts(lesion, (height, width)), patch_counts(valid, (height, width)))


def _density_masks(target: Tensor, sides: Sequence[int], ignore_index: int | None) -> tuple[Tensor, Tensor]:
    """Valid pixels, (B, K, H, W) bool, and the patches' lesion fractions, (B, K, gh, gw) float64."""
    lesion, valid = _lesion_and_valid(target, ignore_index)
    return valid, _fraction(lesion, valid, sides)


def _edge_masks(
    target: Tensor,
    sides: Sequence[int],
    inner_radius: Sequence[int],
    outer_radius: Sequence[int],
    footprint: str,
    isolate_patches: bool,
    density_threshold: float | None,
    ignore_index: int | None,
) -> Tensor:
    """The inner bands of the K classes, then the outer ones, (B, 2 K, H, W) bool; radii are (sparse, dense)."""
    lesion, valid = _lesion_and_valid(target, ignore_index)
    background = outside = valid & ~lesion
    size, patch = (target.shape[2], target.shape[3]), (sides[0], sides[1])
    dense = None
    if density_threshold is not None:
        dense = (_fraction(lesion, valid, sides) > density_threshold).to(target.device)
        dense = dense[..., None, None] if isolate_patches else at_pixels(dense, patch, size)
    if isolate_patches:
        lesion = cut_patches(lesion, patch, fill=False, margin=1)
        outside = cut_patches(background, patch, fill=True, margin=1)
        background = cut_patches(background, patch, fill=False, margin=1)
        outside = outside & background.any(-1, keepdim=True).any(-2, keepdim=True)
    bands = []
    for contour, other, radii in ((inner_contour, outside, inner_radius), (outer_contour, background, outer_radius)):
        band = contour(lesion, other, radii[0], footprint)
        if dense is not None:
            band = torch.where(dense, contour(lesion, other, radii[1], footprint), band)
        bands.append(paste_patches(band, size, margin=1) if isolate_patches else band)
    return _side_by_side(bands)


def _side_by_side(masks: Sequence[Tensor]) -> Tensor:
    """Masks (B, K, H, W) joined along K; as (B, K, H W), of whose memory format the compiler has no doubts."""
    joined: Tensor = torch.cat([mask.flatten(2) for mask in masks], 1).unflatten(2, masks[0].shape[2:])
    return joined


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without its subclass, such as MONAI's MetaTensor."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def _full_precision(target: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast switched off; the meta device has none."""
    return contextlib.nullcontext() if target.is_meta else torch.autocast(target.device.type, enabled=False)


# What the CPU's compiled code calls as it is: made into C++, masks take a hundred times as long to store.
_SCHEMAS: dict[Callable[..., Any], str] = {
    _density_masks: "(Tensor target, int[] sides, int? ignore_index) -> (Tensor, Tensor)",
    _edge_masks: "(Tensor target, int[] sides, int[] inner_radius, int[] outer_radius, str footprint, "
    "bool isolate_patches, float? density_threshold, int? ignore_index) -> Tensor",
    _side_by_side: "(Tensor[] masks) -> Tensor",
}


def _operator(masks: Callable[..., Any], schema: str) -> Callable[..., Any]:
    operator = torch.library.custom_op(
        f"contrastive_exudate_loss::{masks.__name__.removeprefix('_')}", mutates_args=(), schema=schema
    )(masks)
    operator.register_fake(masks)
    return operator


_OPERATORS = {masks: _operator(masks, schema) for masks, schema in _SCHEMAS.items()}


def _opaque(masks: Callable[..., Any], target: Tensor) -> Callable[..., Any]:
    """The function itself, or in compiled code on the CPU its operator."""
    return _OPERATORS[masks] if target.is_cpu and torch.compiler.is_compiling() else masks
