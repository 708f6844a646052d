"""The tap and the losses on segmentation models of other packages: the layer is found, and training lowers the loss."""

import monai.networks.nets as monai_nets
import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision.models.segmentation as torchvision_models
import transformers
from torch import nn

from contrastive_exudate_loss import CombinedExudateLoss, FeatureTap


def batch(size, classes):
    images = torch.rand(2, 3, size, size)
    target = torch.zeros(2, classes, size, size)
    for k in range(classes):
        target[:, k, 8 + 4 * k : 28, 8 : 38 - 4 * k] = 1
    return images + target[:, :1], target


def train(model, size=64, classes=1, layer=None, logits_of=lambda output: output, steps=8):
    """The tap after some steps on one batch, which must lower the loss and reach the first layer."""
    images, target = batch(size, classes)
    tap = FeatureTap(model, layer)
    criterion = CombinedExudateLoss(0.02, 0.1, features=tap)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(steps):
        logits = nn.functional.interpolate(logits_of(model(images)), size=(size, size), mode="bilinear")
        loss = criterion(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert next(model.parameters()).grad.any()
    assert losses[-1] < losses[0]
    return tap


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


ARCHITECTURES = [name for name in dir(smp) if isinstance(getattr(smp, name), type) and name not in ("DPT", "PAN")]


def test_all_of_smp_is_tried():
    bases = (smp.base.SegmentationModel,)
    assert all(issubclass(getattr(smp, name), bases) for name in ARCHITECTURES)
    assert len(ARCHITECTURES) + 2 == 12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures_of_smp(architecture):
    tap = train(getattr(smp, architecture)("resnet18", encoder_weights=None))
    assert repr(tap) == "FeatureTap(layer: 'segmentation_head.0')"


def test_pan_of_smp_which_needs_larger_images():
    tap = train(smp.PAN("resnet18", encoder_weights=None), size=128)
    assert repr(tap) == "FeatureTap(layer: 'segmentation_head.0')"


def test_dpt_of_smp():
    model = smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, dynamic_img_size=True)
    assert repr(train(model)) == "FeatureTap(layer: 'segmentation_head.head.4')"


def test_four_lesions_of_smp():
    train(smp.Unet("resnet18", encoder_weights=None, classes=4), classes=4)


def test_a_classification_head_of_smp_is_passed():
    model = smp.Unet("resnet18", encoder_weights=None, aux_params={"classes": 2})
    tap = train(model, logits_of=lambda output: output[0])
    assert repr(tap) == "FeatureTap(layer: 'segmentation_head.0')"


@pytest.mark.parametrize("aux_loss", [False, True])
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large"])
def test_torchvision_with_and_without_an_auxiliary_head(name, aux_loss):
    model = getattr(torchvision_models, name)(weights=None, weights_backbone=None, num_classes=1, aux_loss=aux_loss)
    tap = train(model, logits_of=lambda output: output["out"])
    assert repr(tap) == "FeatureTap(layer: 'classifier.4')"


def test_lraspp_of_torchvision_adds_up_two_layers_and_asks_which():
    model = torchvision_models.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=1)
    names = ["classifier.high_classifier", "classifier.low_classifier"]
    with pytest.raises(ValueError, match=rf"layers '{names[0]}', '{names[1]}' all make the logits; .*layer=NAME"):
        train(model)
    for name in names:
        train(model, layer=name, logits_of=lambda output: output["out"])


MONAI = {
    "UNet": (lambda: monai_nets.UNet(2, 3, 1, (8, 16, 32), (2, 2)), "model.2.conv"),
    "UNet with residual units": (
        lambda: monai_nets.UNet(2, 3, 1, (8, 16, 32), (2, 2), num_res_units=2),
        "model.2.0.conv",
    ),
    "BasicUNet": (lambda: monai_nets.BasicUNet(2, 3, 1, (8, 8, 16, 16, 16, 8)), "final_conv"),
    "AttentionUnet": (lambda: monai_nets.AttentionUnet(2, 3, 1, (8, 16, 32), (2, 2)), "model.2.conv"),
    "SegResNet": (lambda: monai_nets.SegResNet(2, 8, 3, 1), "conv_final.2.conv"),
    "UNETR": (lambda: monai_nets.UNETR(3, 1, (64, 64), 8, 32, 64, 4, spatial_dims=2), "out.conv.conv"),
    "SwinUNETR": (
        lambda: monai_nets.SwinUNETR(3, 1, feature_size=12, spatial_dims=2, depths=(1,) * 4, num_heads=(1, 2, 4, 8)),
        "out.conv.conv",
    ),
    "DynUNet": (lambda: dyn_unet(deep_supervision=False), "output_block.conv.conv"),
}


def dyn_unet(deep_supervision):
    filters, kernels, strides = [8, 16, 16, 16], [3, 3, 3, 3], [1, 2, 2, 2]
    return monai_nets.DynUNet(
        2, 3, 1, kernels, strides, strides[1:], filters, deep_supervision=deep_supervision, deep_supr_num=2
    )


@pytest.mark.parametrize("name", MONAI)
def test_networks_of_monai(name):
    make, layer = MONAI[name]
    assert repr(train(make())) == f"FeatureTap(layer: {layer!r})"


def test_deep_supervision_of_monai_stacks_its_heads_and_asks_which():
    model = dyn_unet(deep_supervision=True)
    with pytest.raises(
        ValueError, match=r"layers 'deep_supervision_heads.0.conv.conv', .*'output_block.conv.conv' all"
    ):
        train(model)
    train(model, layer="output_block.conv.conv", logits_of=lambda output: output[:, 0])


SMALL = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
TRANSFORMERS = {
    "Segformer": (
        lambda: transformers.SegformerForSemanticSegmentation(
            transformers.SegformerConfig(num_labels=1, decoder_hidden_size=16, **SMALL)
        ),
        "decode_head.classifier",
    ),
    "UperNet, with an auxiliary head": (
        lambda: transformers.UperNetForSemanticSegmentation(
            transformers.UperNetConfig(
                backbone_config=transformers.ConvNextConfig(
                    out_features=["stage1", "stage2", "stage3", "stage4"], **SMALL
                ),
                hidden_size=16,
                num_labels=1,
                auxiliary_in_channels=16,
            )
        ),
        "decode_head.classifier",
    ),
    "DPT, with an auxiliary head": (
        lambda: transformers.DPTForSemanticSegmentation(
            transformers.DPTConfig(
                hidden_size=32,
                num_hidden_layers=4,
                num_attention_heads=2,
                intermediate_size=64,
                image_size=64,
                backbone_out_indices=[0, 1, 2, 3],
                neck_hidden_sizes=[8, 8, 16, 16],
                fusion_hidden_size=16,
                num_labels=1,
            )
        ),
        "head.head.4",
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name):
    make, layer = TRANSFORMERS[name]
    model = make()
    assert repr(train(model, logits_of=lambda output: output.logits)) == f"FeatureTap(layer: {layer!r})"
    if name == "Segformer":
        assert model(batch(64, 1)[0]).logits.shape[-1] == 16


def test_a_segformer_of_five_labels_trains_on_index_masks():
    config = transformers.SegformerConfig(num_labels=5, decoder_hidden_size=16, **SMALL)
    model = transformers.SegformerForSemanticSegmentation(config)
    criterion = CombinedExudateLoss(0.0, 0.1, classes=range(1, 5), ignore_index=255, features=model)
    index = torch.arange(5).repeat_interleave(14)[:64].expand(2, 64, 64).contiguous()
    index[:, :9] = 255
    output = model(torch.rand(2, 3, 64, 64), labels=index)
    logits = torch.nn.functional.interpolate(output.logits, size=(64, 64), mode="bilinear", align_corners=False)
    terms = criterion.terms(logits, index)
    torch.testing.assert_close(terms.supervised, output.loss)
    assert terms.edge > 0
    terms.total.backward()
    assert all(
        parameter.grad.isfinite().all() for parameter in model.decode_head.parameters() if parameter.grad is not None
    )
