"""Whether logits made from a model's own logits show each image and pixel where those do."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

# Where the logits of the first image are probed, as fractions of height and width: near each border, to notice cuts,
# and nowhere that a flip, a rotation or a transposition leaves in place.
_PLACES = ((0.0, 0.9), (0.9, 0.0), (0.9999, 0.1), (0.1, 0.9999), (0.3, 0.6))
# Each next image is probed that much further on, so that no two are probed at the same place (the R2 sequence).
_FURTHER = (0.7548776662466927, 0.5698402909980532)
_REACHED, _STRONGLY = 1 / 256, 1 / 4  # parts of the largest gradient
_RESIZING = ("Upsample", "Adaptive", "Index", "GridSampler")
_ROUNDING = 1e-3  # of the scale, which torch has as a float
_NEAR = 0.3  # pixels


def keeps_places(logits: Tensor, main: GradientEdge, steps: Sequence[Node]) -> bool:
    """Whether the gradient of a logit lands in the same image and at the same place of the main logits.

    The same place is any from which some way of resizing the main logits to the logits' size takes a pixel. Around it
    the gradient may spread over half of the image, as with smoothing, and weakly over all images, as with
    normalisation. Also true if the probe tells nothing: no gradient lands, or the axes of images and pixels are
    unknown.

    Args:
        logits: (B, K, H, W), floating, made from the main ones.
        main: the node, and its output, that the main logits are.
        steps: the nodes that make the logits from main's, each before those it is made from.
    """
    count, classes, *size = logits.shape
    shape = shape_of(main)
    axes = _pixel_axes(shape, size)
    if not axes or shape[0] != count:
        return True
    image = torch.arange(count, device=logits.device)
    # Cutting off the last pixel equals mode="nearest" to one pixel less: only the names of nodes tell them apart.
    resized = any(step.name().startswith(_RESIZING) for step in steps)
    misplaced = []
    with torch.no_grad():
        for number, fractions in enumerate(_PLACES):
            rows, columns = [
                ((fraction + image * further) % 1 * length).long()
                for fraction, further, length in zip(fractions, _FURTHER, size, strict=True)
            ]
            one_hot = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
            one_hot[image, (image + number) % classes, rows, columns] = 1
            try:
                landed = _pulled_back(one_hot, logits.output_nr, main, steps)
            except (RuntimeError, TypeError):  # a step that cannot run now, or not by itself
                return True
            if landed is None:
                return True
            misplaced.append(
                torch.stack(
                    [
                        _lands_elsewhere(landed, row_axis, rows, size[0], resized)
                        | _lands_elsewhere(landed, column_axis, columns, size[1], resized)
                        for row_axis, column_axis in axes
                    ]
                )
            )
    # It is enough that all is in place under one reading of the axes.
    return not bool(torch.stack(misplaced).any(0).all())


def shape_of(edge: GradientEdge) -> tuple[int, ...]:
    """The shape of an output of a node."""
    return tuple(_expected(edge.node)[edge.output_nr].shape)


def _pixel_axes(shape: Sequence[int], size: Sequence[int]) -> list[tuple[int, int]]:
    """Which two axes of main logits may be rows and columns: the last two, or the two before the channels.

    The latter only if rows and columns are scaled alike, within a factor of 4, to the logits' (H, W).
    """
    axes = len(shape)
    found = [(axes - 2, axes - 1)] if axes > 3 else []  # three axes may be tokens (B, N, K)
    if axes >= 3 and 1 / 4 <= (shape[1] * size[1]) / (shape[2] * size[0]) <= 4:
        found.append((1, 2))
    return found


def _lands_elsewhere(landed: Tensor, axis: int, place: Tensor, length: int, resized: bool) -> Tensor:
    """Whether, in an image, the gradient of the logit at a place along an axis lands elsewhere along that axis.

    Args:
        landed: the gradient at the main logits, (B, ...).
        axis: which of its axes to look along.
        place: (B,), the place among the logits' pixels.
        length: how many pixels the logits have along the axis.
        resized: whether they may have been resized other than by leaving out pixels.
    """
    others = [other for other in range(1, landed.dim()) if other != axis]
    profile = landed.float().abs().amax(others)
    largest = profile.amax(1, keepdim=True)
    pixels = profile.shape[1]
    at = torch.arange(pixels, device=landed.device)
    low, high = _wanted(place[:, None], length, pixels, resized)
    reached = profile >= largest * _REACHED
    first = at.where(reached, pixels).amin(1, keepdim=True)
    last = at.where(reached, -1).amax(1, keepdim=True)
    missed = torch.maximum(first - high, low - last) > _NEAR
    far = torch.maximum(low - at, at - high) > pixels / 2 + _NEAR
    spread = far & (profile >= largest * _STRONGLY)
    return ((largest > 0) & (missed | spread)).any()


def _wanted(place: Tensor, length: int, pixels: int, resized: bool) -> tuple[Tensor, Tensor]:
    """The lowest and highest place from which some way of resizing takes a pixel.

    Args:
        place: the pixel after resizing.
        length: how many pixels there are after resizing.
        pixels: how many there are before.
        resized: whether resizing may do other than leave out pixels.
    """
    scale = pixels / length
    scales = [scale]
    if resized and pixels != length:
        scales.append(pixels / (length + 1))  # interpolate(scale_factor=1.3) rounds the size down, not the scale
    ways = [place * ((pixels - 1) / max(length - 1, 1))]  # align_corners
    for scale in scales:
        ways.append((place + 0.5) * scale - 0.5)
        if resized or scale >= 2:  # any pixel under this one: mode="nearest", max-pooling, every second pixel
            ways += [(place * scale).floor(), ((place + 1) * scale - _ROUNDING).ceil() - 1]
    found = torch.stack(ways)
    return found.amin(0), found.amax(0)


def _pulled_back(gradient: Tensor, output: int, main: GradientEdge, steps: Sequence[Node]) -> Tensor | None:
    """The gradient at the main logits, given that at an output of the first step; None if it cannot be told.

    The nodes are called one by one, since torch.autograd.grad would run the hooks of users, of FSDP and of DDP, and
    would free what compiled code keeps, or raise there.
    """
    waiting: dict[Node, dict[int, Tensor]] = {step: {} for step in (*steps, main.node)}
    waiting[steps[0]][output] = gradient
    for step in steps:
        found = _one_step(step, waiting.pop(step))
        if found is None:
            return None
        for (following, number), part in zip(step.next_functions, found, strict=False):
            if part is None or following not in waiting:
                continue
            expected = _expected(following)[number]
            part = part.sum_to_size(expected.shape).to(expected.device, expected.dtype)
            known = waiting[following].get(number)
            waiting[following][number] = part if known is None else known + part
    return waiting[main.node].get(main.output_nr)


def _one_step(step: Any, given: dict[int, Tensor]) -> Sequence[Tensor | None] | None:
    """The gradients at a node's inputs, given those at its outputs, by their numbers; as many as are told."""
    if not given:
        return ()
    gradients = [given.get(output) for output in range(len(_expected(step)))]
    if isinstance(step, torch.autograd.function.BackwardCFunction):
        # A user's own function may count its calls. It is taken to leave pixels in place if the sizes allow that.
        shapes = [expected.shape for expected in _expected(step)]
        inputs = [None if node is None else _expected(node)[output].shape for node, output in step.next_functions]
        return gradients if shapes == inputs else None
    found = step(*gradients)
    return found if isinstance(found, tuple) else (found,)


def _expected(node: Any) -> Sequence[Any]:
    """Shape, dtype and device of the gradients of a node's outputs, which Node's type does not declare."""
    metadata: Sequence[Any] = node._input_metadata
    return metadata
