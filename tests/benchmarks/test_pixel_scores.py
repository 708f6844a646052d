"""Scores are those of torchmetrics on whole images."""

import pytest
import torch
from data.samples import Sample, network_input
from torch import nn
from training import pixel_scores

CPU = torch.device("cpu")


def sample_of(lesion):
    return Sample("made", torch.zeros(3, *lesion.shape, dtype=torch.uint8), lesion)


def drawn(shape, seed, share=0.3):
    generator = torch.Generator().manual_seed(seed)
    lesion = torch.rand(shape, generator=generator) < share
    return torch.rand(shape, generator=generator) * 0.6 + 0.3 * lesion, lesion


def average_precision(probabilities, lesion):
    """Sum over the distinct thresholds, from above, of precision times what recall gains."""
    total, recall = 0.0, 0.0
    for threshold in probabilities.unique().flip(0):
        found = probabilities >= threshold
        hits = float((found & lesion).sum())
        total += (hits / lesion.sum().item() - recall) * hits / found.sum().item()
        recall = hits / lesion.sum().item()
    return total


def test_scores_count_the_pixels_of_all_images_together():
    pairs = [drawn((9, 11), 0), drawn((6, 8), 1)]
    probabilities, lesion = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    found = probabilities > 0.5
    hit, wrong, missed = ((found & lesion).sum(), (found & ~lesion).sum(), (lesion & ~found).sum())
    result = pixel_scores.scores([p for p, _ in pairs], [sample_of(mask) for _, mask in pairs])
    assert result.f1 == pytest.approx(float(2 * hit / (2 * hit + wrong + missed)))
    assert result.iou == pytest.approx(float(hit / (hit + wrong + missed)))
    assert result.average_precision == pytest.approx(average_precision(probabilities, lesion))


def test_a_perfect_prediction_scores_1():
    _, lesion = drawn((12, 10), 2)
    assert pixel_scores.scores([lesion.float()], [sample_of(lesion)]) == (1, 1, 1, 1)


def test_scores_without_any_lesion_are_0():
    assert pixel_scores.scores([torch.rand(8, 8)], [sample_of(torch.zeros(8, 8, dtype=torch.bool))]) == (0, 0, 0, 0)


def test_small_recall_is_the_share_of_small_lesions_that_are_touched_in_all_images():
    lesion = torch.zeros(2, 30, 30, dtype=torch.bool)
    lesion[0, 2, 2] = lesion[0, 6, 4:7] = lesion[1, 20:24, 20:26] = True  # 1, 3 and 24 pixels: small
    lesion[1, 2:7, 2:7] = True  # 25 pixels: not
    found = torch.zeros(2, 30, 30)
    found[0, 6, 6] = found[1, 3:5, 3:5] = 1
    samples = [sample_of(mask) for mask in lesion]
    assert pixel_scores.scores(list(found), samples).small_recall == pytest.approx(1 / 3)


def test_binned_average_precision_is_near_the_exact_one():
    probability, lesion = drawn((40, 50), 3)
    binned = pixel_scores.scores([probability], [sample_of(lesion)], thresholds=1001).average_precision
    assert binned == pytest.approx(average_precision(probability, lesion), abs=0.01)


def test_average_precision_is_exact_until_the_pixels_are_too_many(monkeypatch):
    samples = 2 * [sample_of(torch.zeros(10, 10, dtype=torch.bool))]
    monkeypatch.setattr(pixel_scores, "EXACT_PIXELS", 200)
    assert pixel_scores.average_precision_thresholds(samples) is None
    monkeypatch.setattr(pixel_scores, "EXACT_PIXELS", 199)
    assert pixel_scores.average_precision_thresholds(samples) == pixel_scores.BINS


class Stride8(nn.Module):
    """The first channel as logits; refuses what a network of stride 8 would."""

    def forward(self, images):
        assert not self.training
        assert images.shape[2] % 8 == images.shape[3] % 8 == 0
        return images[:, :1]


@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 23), (5, 3)])
def test_a_prediction_has_the_size_of_its_image(height, width):
    image = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sample = Sample("random", image, torch.zeros(height, width, dtype=torch.bool))
    (prediction,) = pixel_scores.predictions(Stride8(), [sample], 8, CPU)
    torch.testing.assert_close(prediction, network_input(image[0]).sigmoid())
