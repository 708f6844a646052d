"""Random crops are paired, and in range."""

import pytest
import torch
from data.samples import Sample, network_input, random_batch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sample_of(height, width, seed=0):
    """A random photograph whose lesion is where its first channel is above 200, so that each crop shows its mask."""
    image = torch.randint(0, 256, (3, height, width), generator=generator(seed), dtype=torch.uint8)
    return Sample("random", image, image[0] > 200)


def test_network_input_spans_minus_2_to_2():
    torch.testing.assert_close(network_input(torch.tensor([0, 255], dtype=torch.uint8)), torch.tensor([-2.0, 2.0]))


@pytest.mark.parametrize(("height", "width"), [(64, 80), (32, 32), (20, 90), (90, 20), (5, 7)])
def test_crop_and_mask_stay_together(height, width):
    images, target = random_batch([sample_of(height, width)], 12, 32, generator())
    assert images.shape == (12, 3, 32, 32)
    assert target.shape == (12, 1, 32, 32)
    torch.testing.assert_close(target, (images[:, :1] > network_input(torch.tensor(200.5))).float())


def test_a_small_image_is_filled_up_with_black():
    sample = Sample("white", torch.full((3, 5, 7), 255, dtype=torch.uint8), torch.ones(5, 7, dtype=torch.bool))
    images, target = random_batch([sample], 4, 16, generator())
    assert (images == 2).sum((1, 2, 3)).tolist() == 4 * [3 * 5 * 7]
    assert (images == -2).sum((1, 2, 3)).tolist() == 4 * [3 * (16 * 16 - 5 * 7)]
    assert target.sum((1, 2, 3)).tolist() == 4 * [5 * 7]


def test_every_second_crop_lies_over_a_lesion():
    lesion = torch.zeros(300, 300, dtype=torch.bool)
    lesion[7, 290] = True
    sample = Sample("one", torch.zeros(3, 300, 300, dtype=torch.uint8), lesion)
    _, target = random_batch([sample], 40, 16, generator())
    assert target[1::2].sum((1, 2, 3)).tolist() == 20 * [1]
    assert target[::2].sum() < 20
    places = {tuple(crop[0].nonzero()[0].tolist()) for crop in target[1::2]}
    assert len(places) > 5


def test_crops_come_from_everywhere_and_are_flipped_both_ways():
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    image = torch.stack([rows, columns, rows]).to(torch.uint8)
    sample = Sample("ramp", image, torch.zeros(40, 40, dtype=torch.bool))
    images, _ = random_batch([sample], 400, 32, generator())
    rows = (images * 63.75 + 127.5).round()[:, 0]
    assert rows.amin((1, 2)).unique().tolist() == list(range(9))
    assert 100 < (rows[:, 0, 0] > rows[:, -1, 0]).sum() < 300
    columns = (images * 63.75 + 127.5).round()[:, 1]
    assert 100 < (columns[:, 0, 0] > columns[:, 0, -1]).sum() < 300


def test_the_same_generator_gives_the_same_batches():
    samples = [sample_of(50, 60, seed) for seed in range(3)]
    one, other, third = (random_batch(samples, 6, 32, generator(seed)) for seed in (5, 5, 6))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.equal(one[0], third[0])
