"""The definitions of the losses, read off as slow float64 loops; imports nothing of the package."""

import itertools
import math

import torch


def cells(pixels, cells):
    """Index of the feature cell that each pixel of an axis reads."""
    return [pixel * cells // pixels for pixel in range(pixels)]


def ranges(size, patch_size, num_patches):
    """The patches of an axis, as ranges of pixels."""
    side = patch_size if num_patches is None else math.ceil(size / num_patches)
    return [range(start, min(start + side, size)) for start in range(0, size, side)]


def patches(target, patch_size=16, num_patches=None):
    """The (rows, columns) of each patch of a (..., H, W) target, from the top left."""
    rows = ranges(target.shape[-2], patch_size, num_patches)
    columns = ranges(target.shape[-1], patch_size, num_patches)
    return list(itertools.product(rows, columns))


def distance(a, b, footprint):
    """Chebyshev (square) or Manhattan (cross) distance of two pixels."""
    steps = abs(a[0] - b[0]), abs(a[1] - b[1])
    return max(steps) if footprint == "square" else sum(steps)


def near(pixel, others, radius, footprint):
    """Whether any of the other pixels lies within the radius."""
    return any(distance(pixel, other, footprint) <= radius for other in others)


def pixels_of(mask):
    """The (row, column) of each true pixel."""
    return [tuple(pixel) for pixel in mask.nonzero().tolist()]


def fraction(image, patch, ignore_index):
    """Share of lesion among the valid pixels of a patch; None where there is none."""
    values = [int(image[i, j]) for i in patch[0] for j in patch[1]]
    valid = [value for value in values if value != ignore_index]
    return sum(value == 1 for value in valid) / len(valid) if valid else None


def mean_vector(features, pixels, size):
    """Mean feature vector (C,) of some pixels of one image (C, h, w) whose target is of the given size."""
    rows, columns = cells(size[0], features.shape[1]), cells(size[1], features.shape[2])
    return sum(features[:, rows[i], columns[j]] for i, j in pixels) / len(pixels)


def contrast(vectors, labels, temperature=0.05, contrast="nt_xent"):
    """The contrast of a list of vectors, anchor by anchor."""
    if not vectors:
        return torch.zeros((), dtype=torch.float64)
    z = torch.stack([v / torch.linalg.vector_norm(v) if v.detach().abs().sum() > 0 else v * 0 for v in vectors])
    everyone = range(len(z))
    nothing = sum(v.sum() for v in vectors) * 0
    per_anchor = []
    for i in everyone:
        s = z @ z[i] / temperature
        positives = [p for p in everyone if p != i and labels[p] == labels[i]]
        negatives = [n for n in everyone if labels[n] != labels[i]]
        if not negatives:
            return nothing
        if contrast == "nt_xent" and positives:
            per_anchor.append(torch.logaddexp(s[positives], s[negatives].logsumexp(0)) - s[positives])
        elif positives:
            per_anchor.append((s[positives + negatives].logsumexp(0) - s[positives]).mean()[None])
    return torch.cat(per_anchor).mean() if per_anchor else nothing


def class_mean(classes, temperature, contrast_kind):
    """Mean contrast of the (vectors, labels) of those classes that have a positive pair and a negative."""
    terms = [contrast(vectors, labels, temperature, contrast_kind) for vectors, labels in classes]
    number = sum(0 < sum(labels) < len(labels) and len(labels) > 2 for _, labels in classes)
    return sum(terms) / max(1, number)


def density_embeddings(
    features, target, k, *, patch_size=16, num_patches=None, threshold=0.5, select="all", ignore_index=None
):
    """Mean vectors and dense labels of the patches of class k, over the batch."""
    found = []
    for image in range(len(target)):
        mask = target[image, k]
        for rows, columns in patches(mask, patch_size, num_patches):
            share = fraction(mask, (rows, columns), ignore_index)
            if share is not None:
                valid = [(i, j) for i in rows for j in columns if int(mask[i, j]) != ignore_index]
                found.append((share, mean_vector(features[image], valid, mask.shape)))
    dense = [(share, v) for share, v in found if share > threshold]
    sparse = [(share, v) for share, v in found if not share > threshold]
    if select != "all":
        dense = sorted(dense, key=lambda item: -item[0])[:select]
        sparse = sorted(sparse, key=lambda item: item[0])[:select]
    return [v for _, v in dense + sparse], [True] * len(dense) + [False] * len(sparse)


def density_loss(features, target, *, temperature=0.05, contrast_kind="nt_xent", **options):
    """The density term, averaged over the classes that have a contrast."""
    return class_mean(
        [density_embeddings(features, target, k, **options) for k in range(target.shape[1])], temperature, contrast_kind
    )


def radius_at(radius, share, density_threshold):
    """The radius in a patch of this lesion fraction."""
    if isinstance(radius, int):
        return radius
    return radius[1] if share is not None and share > density_threshold else radius[0]


def bands(
    mask,
    *,
    patch_size=16,
    num_patches=None,
    inner_radius=2,
    outer_radius=2,
    footprint="square",
    isolate_patches=False,
    density_threshold=None,
    ignore_index=None,
):
    """The inner and the outer pixels of each patch of one (H, W) mask."""
    lesion = mask == 1
    background = (mask == 0) if ignore_index is None else (mask != ignore_index) & ~lesion
    around = {"lesion": pixels_of(lesion), "background": pixels_of(background)}
    found = []
    for rows, columns in patches(mask, patch_size, num_patches):
        share = fraction(mask, (rows, columns), ignore_index)
        inner_r = radius_at(inner_radius, share, density_threshold)
        outer_r = radius_at(outer_radius, share, density_threshold)
        lesions = [pixel for pixel in around["lesion"] if pixel[0] in rows and pixel[1] in columns]
        backgrounds = [pixel for pixel in around["background"] if pixel[0] in rows and pixel[1] in columns]
        other_side, this_side = around["background"], around["lesion"]
        if isolate_patches:
            outside = itertools.product(range(rows[0] - 1, rows[-1] + 2), range(columns[0] - 1, columns[-1] + 2))
            outside = [pixel for pixel in outside if pixel[0] not in rows or pixel[1] not in columns]
            other_side = backgrounds + outside if backgrounds else []
            this_side = lesions
        inner = [pixel for pixel in lesions if near(pixel, other_side, inner_r, footprint)]
        outer = [pixel for pixel in backgrounds if near(pixel, this_side, outer_r, footprint)]
        found.append((inner, outer))
    return found


def edge_loss(features, target, *, scope="patch", temperature=0.05, contrast_kind="nt_xent", **options):
    """The edge term, averaged over the classes that have a contrast."""
    classes = []
    for k in range(target.shape[1]):
        vectors, labels = [], []
        for image in range(len(target)):
            found = bands(target[image, k], **options)
            if scope == "image":
                found = [tuple([pixel for pair in found for pixel in pair[side]] for side in (0, 1))]
            for pair in found:
                for pixels, label in zip(pair, (True, False), strict=True):
                    if pixels:
                        vectors.append(mean_vector(features[image], pixels, target.shape[-2:]))
                        labels.append(label)
        classes.append((vectors, labels))
    return class_mean(classes, temperature, contrast_kind)


def cross_entropy(logits, target, ignore_index=None):
    """Mean binary cross-entropy with logits over the valid pixels; 0 where there is none."""
    terms = []
    for logit, value in zip(logits.flatten(), target.flatten().tolist(), strict=True):
        if value != ignore_index:
            terms.append(-torch.nn.functional.logsigmoid(logit if value == 1 else -logit))
    return sum(terms) / len(terms) if terms else logits.sum() * 0
