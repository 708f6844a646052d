"""Contrasts of the present embeddings, in six Triton kernels: all terms and classes at once; no size is waited for.

The embeddings of a contrast are compacted on the device, those of label 1 from the front of its rows and those of
label 0 from the back, so that a tile is of one label or of two different ones, and rows without an embedding cost
nothing. The gradient is formed in rows of anchors, from similarities that are computed anew: no sum depends on who
comes first.

A row of the launched grid is a contrast: of each class that of the density term and that of the edge term, or of the
one term that there is. Of the total rows of a class the first ones are those of its first contrast.
"""

import triton
import triton.language as tl

from contrastive_exudate_loss.softplus_triton import softplus

_SIZES = ["first", "total", "classes"]


@triton.jit
def _rows_of(contrast, first, total, terms: tl.constexpr):
    """First row and number of rows of a contrast."""
    of_term = contrast % terms
    return contrast // terms * total + of_term * first, tl.where(of_term == 0, first, total - first)


@triton.jit(do_not_specialize=[*_SIZES, "density_most", "edge_most"])
def take(
    sums, labels, keys, taken, first, total, channels, density_most, edge_most,
    edge: tl.constexpr, terms: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, compared: tl.constexpr,
):  # fmt: skip
    """Those of each label with the lowest keys, the earlier first where keys are equal; one program some rows.

    Args:
        sums: (classes total, C), of which what is not taken is set to 0, and so has no gradient.
        labels: (classes total,), int8: 0 without an embedding, 1 for label 0, 2 for label 1.
        keys: (classes total,), float64.
        taken: (classes total,), int8, to be written: labels, but 0 for what is not taken.
        density_most, edge_most: how many of a label are taken; 0 for all.
    """
    contrast = tl.program_id(1)
    start, n = _rows_of(contrast, first, total, terms)
    begin = tl.program_id(0) * rows
    if begin >= n:
        return
    most = density_most
    if edge:
        most = tl.where(contrast % terms == terms - 1, edge_most, density_most)
    r = begin + tl.arange(0, rows)
    label = tl.load(labels + start + r, r < n, 0)
    if most > 0:
        key = tl.load(keys + start + r, r < n, 0)
        before = tl.zeros([rows], tl.int32)
        for at in range(0, n, compared):
            q = at + tl.arange(0, compared)
            alike = tl.load(labels + start + q, q < n, 0)[None, :] == label[:, None]
            other_key = tl.load(keys + start + q, q < n, 0)[None, :]
            lower = (other_key < key[:, None]) | ((other_key == key[:, None]) & (q[None, :] < r[:, None]))
            before += tl.sum((alike & lower).to(tl.int32), 1)
        c = tl.arange(0, block)
        left = (before >= most)[:, None] & (r < n)[:, None] & (c < channels)[None, :]
        tl.store(sums + (start + r)[:, None] * channels + c[None, :], 0, left)
        label = tl.where(before < most, label, 0)
    tl.store(taken + start + r, label, r < n)


@triton.jit(do_not_specialize=_SIZES)
def compact(
    sums, labels, z, norms, index, counts, first, total, channels,
    terms: tl.constexpr, rows: tl.constexpr, block: tl.constexpr, scan: tl.constexpr,
):  # fmt: skip
    """Directions of the embeddings that are there; one program some rows of a contrast.

    Args:
        sums: (classes total, C), floating.
        labels: (classes total,), int8: 0 without an embedding, 1 for label 0, 2 for label 1.
        z: (classes total, C), to be written where there are embeddings: unit or zero vectors.
        norms: (classes total,), to be written likewise: z norms = sums, of a zero vector infinite.
        index: (classes total,), int32, to be written likewise: the row of the sums.
        counts: (contrasts, 2), int32, to be written: the embeddings of label 1 and of label 0.
    """
    contrast = tl.program_id(1)
    start, n = _rows_of(contrast, first, total, terms)
    begin = tl.program_id(0) * rows
    if begin >= n:
        return
    ones, zeros = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for at in range(0, begin, scan):
        r = at + tl.arange(0, scan)
        label = tl.load(labels + start + r, r < begin, 0)
        ones += tl.sum((label == 2).to(tl.int32), 0)
        zeros += tl.sum((label == 1).to(tl.int32), 0)
    r = begin + tl.arange(0, rows)
    c = tl.arange(0, block)
    label = tl.load(labels + start + r, r < n, 0)
    one, zero = (label == 2).to(tl.int32), (label == 1).to(tl.int32)
    to = start + tl.where(label == 2, ones + tl.cumsum(one, 0) - 1, n - zeros - tl.cumsum(zero, 0))
    if begin + rows >= n:
        tl.store(counts + 2 * contrast, ones + tl.sum(one, 0))
        tl.store(counts + 2 * contrast + 1, zeros + tl.sum(zero, 0))
    there = (label > 0)[:, None] & (c < channels)[None, :]
    vector = tl.load(sums + (start + r)[:, None] * channels + c[None, :], there, 0)
    # Divided by the largest magnitude first, so that no square over- or underflows.
    scale = tl.max(tl.abs(vector), 1)
    scale = tl.where(scale == 0, float("inf"), scale)
    vector /= scale[:, None]
    norm = tl.sqrt(tl.sum(vector * vector, 1))
    norm = tl.where(norm < 1, 1, norm)  # the largest magnitude is 1 now, or all 0
    tl.store(z + to[:, None] * channels + c[None, :], vector / norm[:, None], there)
    tl.store(norms + to, norm * scale, label > 0)
    tl.store(index + to, start + r, label > 0)


@triton.jit
def _anchors(counts, first, total, terms: tl.constexpr, rows: tl.constexpr):
    """A program's anchors, all of one label: first row and number of its label, of the other, and its own rows."""
    contrast = tl.program_id(1)
    start, n = _rows_of(contrast, first, total, terms)
    ones, zeros = tl.load(counts + 2 * contrast), tl.load(counts + 2 * contrast + 1)
    begin = tl.program_id(0) * rows
    of_ones = tl.cdiv(ones, rows) * rows
    first_zero = start + n - zeros
    if begin < of_ones:
        return start, ones, first_zero, zeros, begin + tl.arange(0, rows)
    return first_zero, zeros, start, ones, begin - of_ones + tl.arange(0, rows)


@triton.jit
def _vectors(z, first, r, n, channels, block: tl.constexpr):
    """Directions of the r-th of n embeddings, which begin at row first; 0 beyond."""
    c = tl.arange(0, block)
    return tl.load(z + (first + r)[:, None] * channels + c[None, :], (r < n)[:, None] & (c < channels)[None, :], 0)


@triton.jit
def _product(a, b, precision: tl.constexpr):
    return tl.dot(a, b, input_precision=precision, out_dtype=a.dtype)


@triton.jit
def _temperature(density_temperature, edge_temperature, edge: tl.constexpr, terms: tl.constexpr, dtype: tl.constexpr):
    """That of the program's contrast; a single term is the edge's if edge."""
    if edge:
        is_edge = tl.program_id(1) % terms == terms - 1
        return tl.where(is_edge, tl.full([], edge_temperature, dtype), tl.full([], density_temperature, dtype))
    return tl.full([], density_temperature, dtype)


@triton.jit(do_not_specialize=_SIZES)
def logsumexp(
    z, counts, lse, first, total, channels, density_temperature: tl.float64, edge_temperature: tl.float64,
    edge: tl.constexpr, terms: tl.constexpr, sup_con: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Of each anchor's similarities with its negatives, for sup_con with all others; one program some anchors.

    Args:
        z, counts: as compact makes them.
        lse: (classes total,), to be written where there are anchors; 0 without negatives.
    """
    own, n, others, others_n, r = _anchors(counts, first, total, terms, rows)
    if tl.min(r, 0) >= n:
        return
    anchors = _vectors(z, own, r, n, channels, block)
    anchors /= _temperature(density_temperature, edge_temperature, edge, terms, anchors.dtype)
    top, exps = tl.full([rows], float("-inf"), anchors.dtype), tl.zeros([rows], anchors.dtype)
    for begin in range(0, others_n, rows):
        q = begin + tl.arange(0, rows)
        s = _product(anchors, tl.trans(_vectors(z, others, q, others_n, channels, block)), precision)
        top, exps = _summed(tl.where((q < others_n)[None, :], s, float("-inf")), top, exps)
    if sup_con:
        for begin in range(0, tl.where(others_n > 0, n, 0), rows):
            q = begin + tl.arange(0, rows)
            s = _product(anchors, tl.trans(_vectors(z, own, q, n, channels, block)), precision)
            top, exps = _summed(tl.where((q < n)[None, :] & (q[None, :] != r[:, None]), s, float("-inf")), top, exps)
    tl.store(lse + own + r, tl.where(others_n > 0, top + tl.log(tl.where(others_n > 0, exps, 1)), 0), r < n)


@triton.jit
def _summed(s, top, exps):
    """The largest of each row so far, and the sum of exps divided by its exp, with another tile taken in."""
    higher = tl.maximum(top, tl.max(s, 1))
    return higher, exps * tl.exp(top - higher) + tl.sum(tl.exp(s - higher[:, None]), 1)


@triton.jit(do_not_specialize=_SIZES)
def positives(
    z, counts, lse, weights, losses, gradient,
    first, total, channels, density_temperature: tl.float64, edge_temperature: tl.float64,
    edge: tl.constexpr, terms: tl.constexpr, sup_con: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """What the pairs of equal label give: losses, and what they leave to the negatives; one program some anchors.

    With x = lse_i - s_ip a pair's loss is log(1 + exp(x)), for sup_con x / (n - 1).

    Args:
        z, counts, lse: as above.
        weights: (classes total,), to be written: what an anchor's loss gains by its lse.
        losses: (contrasts, programs), to be written: the sum of the anchors' losses.
        gradient: (classes total, C), to be written: of that sum by z, times the temperature; negatives aside.
    """
    own, n, _others, others_n, r = _anchors(counts, first, total, terms, rows)
    to_loss = losses + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if tl.min(r, 0) >= n:
        tl.store(to_loss, 0)
        return
    anchors = _vectors(z, own, r, n, channels, block)
    temperature = _temperature(density_temperature, edge_temperature, edge, terms, anchors.dtype)
    own_lse = tl.load(lse + own + r, r < n, 0)
    by_z = tl.zeros([rows, block], anchors.dtype)
    loss, weight = tl.zeros([rows], anchors.dtype), tl.zeros([rows], anchors.dtype)
    for begin in range(0, tl.where(others_n > 0, n, 0), rows):
        q = begin + tl.arange(0, rows)
        columns = _vectors(z, own, q, n, channels, block)
        s = _product(anchors / temperature, tl.trans(columns), precision)
        pair = (q < n)[None, :] & (r < n)[:, None] & (q[None, :] != r[:, None])
        x, y = own_lse[:, None] - s, tl.load(lse + own + q, q < n, 0)[None, :] - s
        if sup_con:
            part = x / tl.maximum(n - 1, 1).to(anchors.dtype)
            # Of the anchor's lse and the pair's, in both of which this pair is one of the others.
            pull = 2 / tl.maximum(n - 1, 1).to(anchors.dtype) - tl.exp(-x) - tl.exp(-y)
        else:
            part, share = softplus(x)
            _, share_of_pair = softplus(y)
            weight += tl.sum(tl.where(pair, share, 0), 1)
            pull = share + share_of_pair
        loss += tl.sum(tl.where(pair, part, 0), 1)
        by_z -= _product(tl.where(pair, pull, 0), columns, precision)
    if sup_con:
        weight += 1
    c = tl.arange(0, block)
    tl.store(gradient + (own + r)[:, None] * channels + c[None, :], by_z, (r < n)[:, None] & (c < channels)[None, :])
    tl.store(weights + own + r, tl.where(n > 1, weight, 0), r < n)
    tl.store(to_loss, tl.sum(tl.where(r < n, loss, 0), 0))


@triton.jit(do_not_specialize=_SIZES)
def negatives(
    z, norms, index, counts, lse, weights, gradient, by_sums,
    first, total, channels, density_temperature: tl.float64, edge_temperature: tl.float64, classes,
    edge: tl.constexpr, terms: tl.constexpr, sup_con: tl.constexpr,
    rows: tl.constexpr, block: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """The rest of the gradient, which then is that with respect to the sums too; one program some anchors.

    Args:
        z, norms, index, counts, lse, weights, gradient: as above.
        by_sums: (classes total, C), to be written where there are embeddings: of each term's loss.
    """
    own, n, others, others_n, r = _anchors(counts, first, total, terms, rows)
    if tl.min(r, 0) >= n:
        return
    c = tl.arange(0, block)
    stored = (r < n)[:, None] & (c < channels)[None, :]
    anchors = _vectors(z, own, r, n, channels, block)
    temperature = _temperature(density_temperature, edge_temperature, edge, terms, anchors.dtype)
    own_lse, own_weight = tl.load(lse + own + r, r < n, 0), tl.load(weights + own + r, r < n, 0)
    by_z = tl.load(gradient + (own + r)[:, None] * channels + c[None, :], stored, 0)
    for begin in range(0, others_n, rows):
        q = begin + tl.arange(0, rows)
        columns = _vectors(z, others, q, others_n, channels, block)
        s = _product(anchors / temperature, tl.trans(columns), precision)
        other_lse = tl.load(lse + others + q, q < others_n, 0)
        other_weight = tl.load(weights + others + q, q < others_n, 0)
        push = own_weight[:, None] * tl.exp(s - own_lse[:, None])
        push += other_weight[None, :] * tl.exp(s - other_lse[None, :])
        push = tl.where((q < others_n)[None, :] & (r < n)[:, None], push, 0)
        by_z += _product(push, columns, precision)
    # What is left of the gradient across z; a zero vector's, by its infinite length, is 0.
    by_z -= anchors * tl.sum(anchors * by_z, 1)[:, None]
    contrast = tl.program_id(1)
    scale = temperature * _losses_in(counts, contrast, sup_con).to(anchors.dtype)
    scale *= _classes_with_contrast(counts, contrast % terms, classes, terms).to(anchors.dtype)
    by_z /= tl.load(norms + own + r, r < n, 1)[:, None] * scale
    to = tl.load(index + own + r, r < n, 0)
    tl.store(by_sums + to[:, None] * channels + c[None, :], by_z, stored)


@triton.jit(do_not_specialize=["classes", "programs", "patches", "pixels"])
def add_up(
    losses, counts, supervised, numbers, all_terms, supervised_loss, density_loss, edge_loss, number,
    classes, programs, patches, pixels, alpha: tl.float64, beta: tl.float64,
    terms: tl.constexpr, sup_con: tl.constexpr, scan: tl.constexpr,
):  # fmt: skip
    """The losses, in one program.

    Args:
        losses: (contrasts, programs): sums over some anchors.
        counts: as above.
        supervised: (patches,): sums of cross-entropies; None without.
        numbers: (patches,), int32: of valid pixels; None where no pixel is ignored.
        all_terms: (), to be written if there is supervised: supervised_loss + alpha density_loss + beta edge_loss.
        supervised_loss: (), to be written if there is supervised: its mean over the valid pixels.
        density_loss, edge_loss: (), to be written; None without the term: the mean over the classes with a contrast.
        number: (), to be written if there is supervised: of the valid pixels, at least 1.
        pixels: how many, where none is ignored.
    """
    dtype: tl.constexpr = losses.dtype.element_ty
    weighted = tl.full([], 0, dtype)
    if supervised is not None:
        if numbers is not None:
            divisor = tl.maximum(_total(numbers, patches, tl.int64, scan), 1).to(dtype)
        else:
            divisor = pixels.to(dtype)
        tl.store(number, divisor)
        weighted = _total(supervised, patches, dtype, scan) / divisor
        tl.store(supervised_loss, weighted)
    if density_loss is not None:
        loss = _mean(losses, counts, 0, classes, programs, terms, sup_con, dtype, scan)
        tl.store(density_loss, loss)
        weighted += tl.full([], alpha, dtype) * loss
    if edge_loss is not None:
        loss = _mean(losses, counts, terms - 1, classes, programs, terms, sup_con, dtype, scan)
        tl.store(edge_loss, loss)
        weighted += tl.full([], beta, dtype) * loss
    if supervised is not None:
        tl.store(all_terms, weighted)


@triton.jit
def _total(values, size, dtype: tl.constexpr, scan: tl.constexpr):
    """Sum of (size,) values, ()."""
    total = tl.full([], 0, dtype)
    for begin in range(0, size, scan):
        at = begin + tl.arange(0, scan)
        total += tl.sum(tl.load(values + at, at < size, 0).to(dtype), 0)
    return total


@triton.jit
def _mean(
    losses, counts, of_term, classes, programs, terms: tl.constexpr, sup_con: tl.constexpr,
    dtype: tl.constexpr, scan: tl.constexpr,
):  # fmt: skip
    """A term's loss: of each class the mean over its losses, of these the mean over the classes with a contrast."""
    loss = tl.full([], 0, dtype)
    for k in range(classes):
        contrast = k * terms + of_term
        of_class = _total(losses + contrast * programs, programs, dtype, scan)
        loss += of_class / _losses_in(counts, contrast, sup_con).to(dtype)
    return loss / _classes_with_contrast(counts, of_term, classes, terms).to(dtype)


@triton.jit
def _losses_in(counts, contrast, sup_con: tl.constexpr):
    """Over how many losses a contrast is a mean, at least 1: ordered pairs of a label, for sup_con anchors in one."""
    ones, zeros = tl.load(counts + 2 * contrast).to(tl.int64), tl.load(counts + 2 * contrast + 1).to(tl.int64)
    if sup_con:
        n = tl.where(ones > 1, ones, 0) + tl.where(zeros > 1, zeros, 0)
    else:
        n = ones * (ones - 1) + zeros * (zeros - 1)
    return tl.maximum(n, 1)


@triton.jit
def _classes_with_contrast(counts, of_term, classes, terms: tl.constexpr):
    """How many classes have a contrast in a term: a pair of one label, and one of the other; at least 1."""
    n = tl.full([], 0, tl.int32)
    for k in range(classes):
        at = counts + 2 * (k * terms + of_term)
        ones, zeros = tl.load(at), tl.load(at + 1)
        n += ((tl.minimum(ones, zeros) > 0) & (tl.maximum(ones, zeros) > 1)).to(tl.int32)
    return tl.maximum(n, 1)
