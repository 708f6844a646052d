"""Target to masks to sums of the features under them, in one Triton kernel; another spreads the sums' gradient.

The features are read once and their gradient is written once, at any stride and in any memory format. Masks are made
in a halo around each patch, and kept as a byte a pixel: bit t says whether mask t holds it. The masks are the valid
pixels, if there is a density term, then the inner and the outer band, if there is an edge term.
"""

import triton
import triton.language as tl

from contrastive_exudate_loss.softplus_triton import softplus

# Ints that would only compile the kernels anew: of the batch's size and of the options.
_SIZES = ["batch", "classes", "height", "width", "rows", "columns", "side_y", "side_x", "total"]
_RADII = ["inner", "outer", "dense_inner", "dense_outer", "ignored"]


@triton.jit
def lesion_and_valid(target, at, inside, ignored, ignores: tl.constexpr):
    """Which pixels are lesion, and which valid, at some offsets of a target."""
    value = tl.load(target + at, inside, 0)
    valid = inside & (value != ignored) if ignores else inside
    return valid & (value != 0), valid


@triton.jit(do_not_specialize=[*_SIZES, "band_first", "band_total", *_RADII])
def pool(
    features, target, logits, codes, sums, labels, keys,
    bands, band_labels, band_first, band_total, supervised, numbers, image, channel, row, column,
    batch, classes, channels, height, width, rows, columns, side_y, side_x, total,
    inner, outer, dense_inner, dense_outer, density_threshold: tl.float64, edge_threshold: tl.float64, ignored,
    density: tl.constexpr, edge: tl.constexpr, cross: tl.constexpr, isolate: tl.constexpr, ignores: tl.constexpr,
    pixels: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """One program a patch of an image and class, and a block of channels.

    Args:
        features: (B, C, h, w), floating, of the strides image, channel, row, column.
        target: (B, K, H, W), contiguous.
        logits: (B, K, H, W), contiguous; None without a supervised loss.
        codes: (B, K, H, W), uint8, to be written: the masks.
        sums: (K, total, C), to be written if there is a density term: in the first B gh gw rows of each class, over
            the valid pixels of a patch.
        labels: (K, total), int8, to be written in the same rows: 0 for an empty mask, 1 for label 0, 2 for label 1.
        keys: (K, total), float64, to be written in the same rows: lowest for the densest dense and the sparsest sparse
            patches; None if nobody reads them.
        bands, band_labels: (K, band_total, C) and (K, band_total), to be written if there is an edge term: in the
            2 B gh gw rows of each class from band_first on, over the inner and then over the outer bands.
        supervised: (K, B, gh, gw), to be written: the sum of the pixels' cross-entropies.
        numbers: (K, B, gh, gw), int32, to be written: how many valid pixels, where pixels are ignored.
        inner, outer: radii, in pixels, in sparse patches; dense_inner, dense_outer in dense ones.
        density_threshold, edge_threshold: lesion fraction above which a patch is dense.
    """
    patch = tl.program_id(0)  # of (K, B, gh, gw)
    grid_y, grid_x = tl.cdiv(height, side_y), tl.cdiv(width, side_x)
    c = tl.program_id(1) * block + tl.arange(0, block)
    x, y, b = patch % grid_x, patch // grid_x % grid_y, patch // (grid_x * grid_y) % batch
    k = patch // (grid_x * grid_y * batch)
    start = (b * classes + k).to(tl.int64) * height * width
    target += start
    codes += start
    features += b.to(tl.int64) * image
    top, left = y * side_y, x * side_x
    bottom, right = tl.minimum(top + side_y, height), tl.minimum(left + side_x, width)

    valids, lesions = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for first in range(0, side_y * side_x, pixels):
        i, j, inside = _pixels_of(first + tl.arange(0, pixels), top, left, bottom, right, side_x)
        lesion, valid = lesion_and_valid(target, i * width + j, inside, ignored, ignores)
        valids += tl.sum(valid.to(tl.int32), 0)
        lesions += tl.sum(lesion.to(tl.int32), 0)
    fraction = lesions.to(tl.float64) / tl.maximum(valids, 1).to(tl.float64)
    if edge:
        inner = tl.where(fraction > edge_threshold, dense_inner, inner)
        outer = tl.where(fraction > edge_threshold, dense_outer, outer)
        reach = tl.maximum(inner, outer)
        # What a pixel may see: its patch or the image.
        y_0, y_1, x_0, x_1 = (top, bottom, left, right) if isolate else (0, height, 0, width)
        near = lesions
        if not isolate:
            near = tl.full([], 0, tl.int32)
            for first in range(0, (side_y + 2 * reach) * (side_x + 2 * reach), pixels):
                n = first + tl.arange(0, pixels)
                up, down, before, after = top - reach, bottom + reach, left - reach, right + reach
                i, j, inside = _pixels_of(n, up, before, down, after, side_x + 2 * reach)
                inside = inside & (i >= y_0) & (i < y_1) & (j >= x_0) & (j < x_1)
                lesion, _ = lesion_and_valid(target, i * width + j, inside, ignored, ignores)
                near += tl.sum(lesion.to(tl.int32), 0)
        # Most patches are far from any lesion, and have no bands to look for.
        reach_up, reach_down = tl.where(near > 0, -reach, 0), tl.where(near > 0, reach + 1, 0)

    whole_sum = tl.zeros([block], sums.dtype.element_ty)
    inner_sum, outer_sum = whole_sum, whole_sum
    inners, outers = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    if logits is not None:
        loss = tl.full([], 0, supervised.dtype.element_ty)
    for first in range(0, side_y * side_x, pixels):
        i, j, inside = _pixels_of(first + tl.arange(0, pixels), top, left, bottom, right, side_x)
        lesion, valid = lesion_and_valid(target, i * width + j, inside, ignored, ignores)
        code = tl.zeros([pixels], tl.uint8)
        if density:
            code = valid.to(tl.uint8)
        if edge:
            near_lesion, near_background = inside & False, inside & False
            for up in range(reach_up, reach_down):
                row_seen = inside & (i + up >= y_0) & (i + up < y_1)
                for side in range(reach_up, reach_down):
                    distance = tl.abs(up) + tl.abs(side) if cross else tl.maximum(tl.abs(up), tl.abs(side))
                    seen = row_seen & (j + side >= x_0) & (j + side < x_1)
                    at = (i + up) * width + j + side
                    other_lesion, other_valid = lesion_and_valid(target, at, seen, ignored, ignores)
                    background = other_valid & (other_lesion == 0)
                    if isolate:  # the outside of a patch is background, unless the patch has none
                        background |= (seen == 0) & (valids > lesions)
                    near_background |= background & (distance <= inner)
                    near_lesion |= other_lesion & (distance <= outer)
            inner_band, outer_band = lesion & near_background, valid & (lesion == 0) & near_lesion
            inners += tl.sum(inner_band.to(tl.int32), 0)
            outers += tl.sum(outer_band.to(tl.int32), 0)
            in_bands = inner_band.to(tl.uint8) + 2 * outer_band.to(tl.uint8)
            code += 2 * in_bands if density else in_bands
        at = (i * rows // height) * row + (j * columns // width) * column
        vectors = tl.load(features + c[:, None] * channel + at[None, :], (c < channels)[:, None] & inside[None, :], 0)
        vectors = vectors.to(sums.dtype.element_ty)
        if density:
            whole_sum += tl.sum(tl.where(valid[None, :], vectors, 0), 1)
        if edge:
            inner_sum += tl.sum(tl.where(inner_band[None, :], vectors, 0), 1)
            outer_sum += tl.sum(tl.where(outer_band[None, :], vectors, 0), 1)
        if tl.program_id(1) == 0:
            tl.store(codes + i * width + j, code, inside)
            if logits is not None:
                logit = tl.load(logits + start + i * width + j, valid, 0).to(loss.dtype)
                entropy, _ = softplus(tl.where(lesion, -logit, logit))
                loss += tl.sum(tl.where(valid, entropy, 0), 0)

    patches = grid_x * grid_y * batch
    if logits is not None:
        tl.store(supervised + patch, loss, tl.program_id(1) == 0)
        if ignores:
            tl.store(numbers + patch, valids, tl.program_id(1) == 0)
    patch -= k * patches  # of (B, gh, gw)
    if density:
        dense = fraction > density_threshold
        place = k * total + patch
        _store_sum(sums, labels, place, c, channels, whole_sum, tl.where(valids > 0, tl.where(dense, 2, 1), 0))
        if keys is not None:
            tl.store(keys + place, tl.where(dense, -fraction, fraction), tl.program_id(1) == 0)
    if edge:
        place = k * band_total + band_first + patch
        _store_sum(bands, band_labels, place, c, channels, inner_sum, tl.where(inners > 0, 2, 0))
        _store_sum(bands, band_labels, place + patches, c, channels, outer_sum, tl.where(outers > 0, 1, 0))


@triton.jit
def _pixels_of(n, top, left, bottom, right, side_x):
    """Row and column of the n-th pixels of a patch, and whether it has them."""
    i, j = top + n // side_x, left + n % side_x
    return i, j, (i < bottom) & (j < right)


@triton.jit
def _store_sum(sums, labels, place, c, channels, total, label):
    tl.store(sums + place * channels + c, total, c < channels)
    tl.store(labels + place, label.to(tl.int8), tl.program_id(1) == 0)


@triton.jit(do_not_specialize=[*_SIZES, "per_row", "per_column"])
def spread(
    by_features, codes, by_sums, by_total, by_density, by_edge, alpha: tl.float64, beta: tl.float64,
    image, channel, row, column,
    batch, classes, channels, height, width, rows, columns, side_y, side_x, total, per_row, per_column,
    density: tl.constexpr, edge: tl.constexpr, per_image: tl.constexpr, cells: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The features' gradient, one program some cells of an image and a block of channels: the sum over their pixels.

    Args:
        by_features: (B, C, h, w), floating, of the strides image, channel, row, column, to be written.
        codes: (B, K, H, W), uint8: the masks.
        by_sums: (K, total, C): gradient with respect to the sums under masks that are not empty; of a class first those
            of the density term, (B, gh, gw), then of the edge term (2, B, gh, gw), or (2, B) if per_image.
        by_total, by_density, by_edge, alpha, beta: as of factor.
        per_row, per_column: the most pixels of a cell along each axis.
    """
    cell = tl.program_id(0) * cells + tl.arange(0, cells)
    b = tl.program_id(1)
    c = tl.program_id(2) * block + tl.arange(0, block)
    y, x, inside = cell // columns, cell % columns, cell < rows * columns
    image_of_cell = tl.full([cells], b, tl.int32)
    top, bottom = tl.cdiv(y * height, rows), tl.cdiv((y + 1) * height, rows)
    left, right = tl.cdiv(x * width, columns), tl.cdiv((x + 1) * width, columns)
    grid_y, grid_x = tl.cdiv(height, side_y), tl.cdiv(width, side_x)
    patches = grid_y * grid_x * batch
    masks: tl.constexpr = density + 2 * edge
    gradient = tl.zeros([block, cells], by_sums.dtype.element_ty)
    density_factor = factor(by_total, alpha, by_density, gradient.dtype)
    edge_factor = factor(by_total, beta, by_edge, gradient.dtype)
    for k in range(classes):
        start = (b * classes + k).to(tl.int64) * height * width
        for n in range(per_row * per_column):
            i, j = top + n // per_column, left + n % per_column
            here = inside & (i < bottom) & (j < right)
            code = tl.load(codes + start + i * width + j, here, 0)
            patch = (b * grid_y + i // side_y) * grid_x + j // side_x
            for t in tl.static_range(masks):
                held = (((code >> t) & 1) != 0)[None, :] & (c < channels)[:, None]
                place = k * total + t * patches + patch
                if per_image and t >= density:
                    place = k * total + density * patches + (t - density) * batch + image_of_cell
                by_sum = tl.load(by_sums + (place * channels)[None, :] + c[:, None], held, 0)
                gradient += by_sum * (density_factor if density and t == 0 else edge_factor)
    to = by_features + b.to(tl.int64) * image + c[:, None] * channel + (y * row + x * column)[None, :]
    tl.store(to, gradient.to(by_features.dtype.element_ty), inside[None, :] & (c < channels)[:, None])


@triton.jit
def factor(by_total, weight, by_part, dtype: tl.constexpr):
    """What the gradient of a part of the total is multiplied by, (): by_total weight + by_part, None for none."""
    result = tl.full([], 0, dtype)
    if by_total is not None:
        result += tl.load(by_total).to(dtype) * tl.full([], weight, dtype)
    if by_part is not None:
        result += tl.load(by_part).to(dtype)
    return result
