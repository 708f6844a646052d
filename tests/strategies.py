"""What hypothesis draws: masks, features and options of the losses, the degenerate ones always within reach."""

import torch
from hypothesis import strategies as st

CONTRASTS = ("nt_xent", "sup_con")
FOOTPRINTS = ("square", "cross")


@st.composite
def masks(draw, batch=(1, 3), classes=(1, 2), side=(1, 20), ignored=False):
    """(B, K, H, W) int64 of 0, 1 and, if ignored, 255: empty, full, one pixel, blobs or noise."""
    shape = [draw(st.integers(*bounds)) for bounds in (batch, classes, side, side)]
    kind = draw(st.sampled_from(["empty", "full", "pixel", "blobs", "noise"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = torch.rand(shape, generator=generator)
    mask = torch.zeros(shape, dtype=torch.int64)
    if kind == "full":
        mask += 1
    elif kind == "pixel":
        mask.view(-1)[int(noise.argmax())] = 1
    elif kind == "blobs":
        mask = (torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1) > 0.5).long()
    elif kind == "noise":
        mask = (noise < draw(st.sampled_from([0.1, 0.5, 0.9]))).long()
    if ignored:
        share = draw(st.sampled_from([0.0, 0.2, 0.9, 1.0]))
        mask[torch.rand(shape, generator=generator) < share] = 255
    return mask


@st.composite
def features_for(draw, batch, dtype=torch.float64, channels=(2, 4), side=(1, 24)):
    """(B, C, h, w) of normal values, sometimes a strided view."""
    shape = [batch] + [draw(st.integers(*bounds)) for bounds in (channels, side, side)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        return torch.randn(shape, generator=generator, dtype=dtype)
    batch, channels, height, width = shape
    return torch.randn(batch, height, width, channels, generator=generator, dtype=dtype).movedim(-1, 1)


def sides():
    """Options that give the patches: at most one of patch_size and num_patches."""
    return st.one_of(
        st.builds(lambda p: {"patch_size": p}, st.sampled_from([1, 2, 3, 4, 5, 8, 30])),
        st.builds(lambda n: {"num_patches": n}, st.sampled_from([1, 2, 3, 5, 7, 40])),
    )


@st.composite
def density_options(draw):
    """Options of PatchDensityContrastLoss that draw nothing at random."""
    return draw(sides()) | {
        "threshold": draw(st.sampled_from([0.0, 0.25, 0.3, 0.5, 0.9])),
        "temperature": draw(st.sampled_from([0.01, 0.05, 1.0])),
        "contrast": draw(st.sampled_from(CONTRASTS)),
        "select": draw(st.sampled_from(["all", 2, 3])),
    }


@st.composite
def edge_options(draw):
    """Options of PatchEdgeContrastLoss that draw nothing at random."""
    threshold = draw(st.sampled_from([None, 0.0, 0.3, 0.5]))
    radius = st.integers(1, 4)
    if threshold is not None:
        radius = st.one_of(radius, st.tuples(radius, radius))
    return draw(sides()) | {
        "inner_radius": draw(radius),
        "outer_radius": draw(radius),
        "footprint": draw(st.sampled_from(FOOTPRINTS)),
        "isolate_patches": draw(st.booleans()),
        "scope": draw(st.sampled_from(["patch", "image"])),
        "density_threshold": threshold,
        "temperature": draw(st.sampled_from([0.01, 0.05, 1.0])),
        "contrast": draw(st.sampled_from(CONTRASTS)),
    }
