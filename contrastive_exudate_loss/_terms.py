"""What the two contrastive terms share: pooling their masks to embeddings, and contrasting these."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contrastive_exudate_loss import _checks, fused
from contrastive_exudate_loss._options import MaskLoss
from contrastive_exudate_loss.contrast import CONTRASTS, contrast_loss, first_of_each_label
from contrastive_exudate_loss.distributed import lengths_of_ranks, of_all_ranks, rank_and_count, sum_of_ranks
from contrastive_exudate_loss.masks import Regions, lesion_and_valid, side_by_side
from contrastive_exudate_loss.patches import patch_sides
from contrastive_exudate_loss.pooling import masked_sums


class Candidates(NamedTuple):
    """The embeddings of one class that a contrast may take.

    vectors: (M, C), floating.
    labels: (M,), bool.
    present: (M,), bool; the others count for nothing.
    sort_key: (M,), real: the lowest are selected first; None where all take part.
    """

    vectors: Tensor
    labels: Tensor
    present: Tensor
    sort_key: Tensor | None = None


class PatchContrastLoss(MaskLoss):
    """A term that contrasts two kinds of regions; a subclass says which, and how to label their embeddings."""

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
        self._check_changed_options()
        _checks.check_target(target)
        _checks.check_features(features, target)
        features, target = plain(features), plain(target)
        self._check_values(target, [self.ignore_index])
        (loss,) = term_losses([self], [features], target)
        return loss

    def extra_repr(self) -> str:
        options = {name: value for name, value in vars(self).items() if not name.startswith("_") and name != "training"}
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)

    def _check_options(self) -> None:
        super()._check_options()
        if (self.patch_size is None) == (self.num_patches is None):
            raise ValueError(
                "give one of patch_size and num_patches and leave the other None, got "
                f"patch_size={self.patch_size!r} and num_patches={self.num_patches!r}"
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

    def _selected_count(self) -> int | None:
        """How many embeddings of each label are selected, lowest sort_key first; None for all."""
        return None

    def _for_kernels(self) -> fused.Density | fused.Edge | None:
        """What the kernels have to know of this term; None where they cannot compute it."""
        return None

    def _regions(self, target: Tensor, sides: tuple[int, int]) -> Regions:
        """What to pool of a target, (B, K, H, W)."""
        raise NotImplementedError

    def _candidates(self, sums: Tensor, present: Tensor, regions: Regions) -> Sequence[Candidates]:
        """The candidates of each class, from the pooled regions.

        Sums stand in for means, since a contrast sees directions alone.

        Args:
            sums: (B, T, gh, gw, C), floating.
            present: (B, T, gh, gw), bool: where a region has pixels.
            regions: this term's.
        """
        raise NotImplementedError


def term_losses(terms: Sequence[PatchContrastLoss], features: Sequence[Tensor], target: Tensor) -> list[Tensor]:
    """The loss of each term, from one pooling for all that have the same features and patches of the same size.

    Args:
        terms: terms whose options have been checked.
        features: one per term, (B, C, h, w), floating.
        target: (B, K, H, W) of 0, 1 and the terms' ignore_index.
    """
    sides = _sides(terms, target)
    losses: dict[int, Tensor] = {}
    calls = _calls(terms, features, target, sides)
    if calls is not None:
        for call in calls:
            found = call.function.apply(features[call.members[0]], None, target, call.work, 0.0, 0.0)
            losses.update(zip(call.members, found, strict=True))
        return [losses[n] for n in range(len(terms))]
    if terms and target.shape[1] > 1 and target.is_cpu and _checks.may_read(target):
        target = _shown_classes(target, terms)
    # Of each term the first whose pooling it can share.
    first = [
        next(m for m in range(n + 1) if features[m] is features[n] and sides[m] == sides[n]) for n in range(len(terms))
    ]
    with full_precision(target):
        regions = [term._regions(target, own) for term, own in zip(terms, sides, strict=True)]
        for leader in dict.fromkeys(first):
            members = [n for n, own in enumerate(first) if own == leader]
            masks = [mask for n in members for mask in regions[n].masks]
            sums, counts = masked_sums(features[leader], side_by_side(masks), sides[leader])
            lengths = [sum(mask.shape[1] for mask in regions[n].masks) for n in members]
            parts = (whole.split(lengths, 1) for whole in (sums, counts.bool()))
            for n, own, present in zip(members, *parts, strict=True):
                losses[n] = _class_mean(terms[n], terms[n]._candidates(own, present, regions[n]))
    return [losses[n] for n in range(len(terms))]


def losses_with_cross_entropy(
    terms: Sequence[PatchContrastLoss],
    features: Tensor,
    logits: Tensor,
    target: Tensor,
    ignore_index: int | None,
    weights: Sequence[float],
) -> Sequence[Tensor] | None:
    """The weighted total, binary cross-entropy and the loss of each term, where the kernels do it all; else None.

    Args:
        terms: at least one, with options that have been checked.
        features: (B, C, h, w), floating.
        logits: (B, K, H, W), floating.
        target: (B, K, H, W) of 0, 1 and the ignore_index of each.
        ignore_index: that of the cross-entropy.
        weights: of density and edge.
    """
    calls = _calls(terms, [features] * len(terms), target, _sides(terms, target))
    if calls is None or len(calls) > 1 or calls[0].work.ignore_index != _checks.held(target, ignore_index):
        return None
    dtypes = {torch.promote_types(tensor.dtype, torch.float32) for tensor in (logits, features)}
    if len(dtypes) > 1:
        return None
    losses: Sequence[Tensor] = calls[0].function.apply(features, logits, target, calls[0].work, *weights)
    return losses


def plain(tensor: Tensor) -> Tensor:
    """The tensor without its subclass, such as MONAI's MetaTensor."""
    return tensor if type(tensor) is Tensor else tensor.as_subclass(Tensor)


def full_precision(target: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off on the target's device; the meta device has none."""
    kind = target.device.type
    if target.is_meta or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def _sides(terms: Sequence[PatchContrastLoss], target: Tensor) -> list[tuple[int, int]]:
    return [patch_sides(target.shape[2], target.shape[3], term.patch_size, term.num_patches) for term in terms]


class _Call(NamedTuple):
    """A call of the kernels.

    function: fused_triton.Fused; None where it cannot do the work.
    work: what it does.
    members: the terms whose losses it gives.
    gathers: whether they contrast the embeddings of all processes.
    """

    function: Any
    work: fused.Work
    members: list[int]
    gathers: bool


def _calls(
    terms: Sequence[PatchContrastLoss], features: Sequence[Tensor], target: Tensor, sides: Sequence[tuple[int, int]]
) -> list[_Call] | None:
    """One for all terms of the same features, patches, ignored pixels and contrast; None where kernels cannot do it."""
    if not terms or not fused.switched_on(features[0]):
        return None
    alike: dict[Any, list[int]] = {}
    for n, term in enumerate(terms):
        # By options alone, so that all processes that gather make the same calls, whatever their sizes.
        patch = term.patch_size, term.num_patches
        alike.setdefault((id(features[n]), patch, term.ignore_index, term.contrast, _gathers(term)), []).append(n)
    calls = []
    for (_, _, ignore_index, contrast, gathers), members in alike.items():
        leader = members[0]
        options = [terms[n]._for_kernels() for n in members]
        density = next((option for option in options if isinstance(option, fused.Density)), None)
        edge = next((option for option in options if isinstance(option, fused.Edge)), None)
        work = fused.Work(sides[leader], _checks.held(target, ignore_index), contrast == "sup_con", density, edge)
        function = None if None in options else fused.kernels(features[leader], target, sides[leader])
        calls.append(_Call(function, work, members, gathers))
    if any(call.gathers for call in calls):
        return _joint(calls, features[0], target)
    return calls if all(call.function for call in calls) else None


def _joint(calls: Sequence[_Call], features: Tensor, target: Tensor) -> list[_Call] | None:
    """The calls, where they gather with the lengths of all processes; None on every process if one cannot do them."""
    lengths = [length for call in calls for length in call.work.lengths(target)]
    facts = features.shape[1], features.itemsize, target.shape[1]
    by_rank = lengths_of_ranks([all(call.function for call in calls), *lengths], *facts, device=features.device)
    embeddings = sum(sum(rank[1:]) for rank in by_rank)
    if not all(rank[0] for rank in by_rank) or embeddings * target.shape[1] * features.shape[1] >= fused.OFFSETS:
        return None
    joint = []
    for n, call in enumerate(calls):
        ranks = tuple((rank[2 * n + 1], rank[2 * n + 2]) for rank in by_rank)
        joint.append(call._replace(work=call.work._replace(ranks=ranks)) if call.gathers else call)
    return joint


def _gathers(term: PatchContrastLoss) -> bool:
    """Whether this call contrasts the embeddings of all processes."""
    return term.gather_distributed and torch.is_grad_enabled() and rank_and_count()[1] > 1


def _class_mean(term: PatchContrastLoss, classes: Sequence[Candidates]) -> Tensor:
    """Mean over the classes that have a contrast: draw at random, gather from all processes, select, contrast."""
    gathers = _gathers(term)
    most = term._selected_count()
    losses, contrasted = [], []
    for candidates in classes:
        if term.max_patches is not None:
            drawn = torch.randperm(len(candidates.vectors), device=candidates.vectors.device)
            candidates = _first(candidates, drawn, term.max_patches)
        if gathers:
            candidates = _gathered(candidates, len(classes))
        if candidates.sort_key is not None and most is not None:
            candidates = _first(candidates, candidates.sort_key, most)
        shares = gathers and _shares_anchors(candidates.vectors)
        part, parts = rank_and_count() if shares else (0, 1)
        vectors, labels, present, _ = candidates
        loss = contrast_loss(
            vectors,
            labels,
            present,
            temperature=term.temperature,
            contrast=term.contrast,
            part=part,
            parts=parts,
        )
        losses.append(sum_of_ranks(loss) if shares else loss)
        if len(classes) > 1:
            contrasted.append(_has_contrast(labels, present))
    if len(classes) == 1:
        return losses[0]
    # A class without a contrast has loss 0.
    return torch.stack(losses).sum() / torch.stack(contrasted).sum().clamp(min=1)


def _has_contrast(labels: Tensor, present: Tensor) -> Tensor:
    """Whether one label has a pair and the other label an embedding, (), bool."""
    ones, zeros = (labels & present).sum(), (~labels & present).sum()
    return (torch.minimum(ones, zeros) > 0) & (torch.maximum(ones, zeros) > 1)


def _shown_classes(target: Tensor, terms: Sequence[PatchContrastLoss]) -> Tensor:
    """The target's classes with a lesion pixel, at least one class: the others have no contrast, but cost as much."""
    if any(term.gather_distributed for term in terms):  # another process may show the class
        return target
    shown = torch.stack(
        [
            lesion_and_valid(target, ignore_index)[0].flatten(2).any(2).any(0)
            for ignore_index in dict.fromkeys(term.ignore_index for term in terms)
        ]
    ).any(0)
    if not bool(shown.any()):
        return target[:, :1]
    return target if bool(shown.all()) else target[:, shown]


def _first(candidates: Candidates, sort_key: Tensor, most: int) -> Candidates:
    """Those with the lowest sort_key, at most `most` of each label."""
    index, present = first_of_each_label(sort_key, candidates.labels, candidates.present, most)
    return Candidates(candidates.vectors[index], candidates.labels[index], present)


def _gathered(candidates: Candidates, classes: int) -> Candidates:
    """The present ones of all processes."""
    vectors, labels, present, sort_key = candidates
    columns = [column[present] for column in (labels, sort_key) if column is not None]
    vectors, labels, *sort_keys = of_all_ranks(vectors[present], *columns, classes=classes)
    return Candidates(vectors, labels, torch.ones_like(labels), *sort_keys)


def _shares_anchors(vectors: Tensor) -> bool:
    """Whether each process contrasts its part of the anchors; on the CPU contrasting all is faster for a few."""
    return not vectors.is_cpu
