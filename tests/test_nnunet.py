"""The trainers of docs/nnunet.md train as nnU-Net's own, with its own loop, on a tiny data set.

Run by `pytest -m nnunet tests/test_nnunet.py` where nnU-Net is installed, which needs a timm older than that of the
other tests: see .ci/run.
"""

import copy
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from contrastive_exudate_loss import CombinedExudateLoss, LossTerms, PatchEdgeContrastLoss

pytestmark = [
    pytest.mark.nnunet,
    pytest.mark.filterwarnings("ignore:::nnunetv2"),
    pytest.mark.filterwarnings("ignore:::batchgenerators"),
    pytest.mark.filterwarnings("ignore:.torch.jit.interface. is deprecated:FutureWarning"),  # of timm
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning:torch"),  # where nnU-Net compiles its Dice loss
]
BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs/nnunet.md").read_text(), re.DOTALL)
TRAINER, REGIONS = "nnUNetTrainerContrast", "nnUNetTrainerContrastRegions"
LABELS = {"background": 0, "microaneurysms": 1, "exudates": 2}
CASES = {
    "labels": (TRAINER, LABELS),
    "labels and an ignore label": (TRAINER, LABELS | {"ignore": 3}),
    "regions": (TRAINER, {"background": 0, "lesions": [1, 2], "exudates": 2}),
    "regions and an ignore label": (REGIONS, {"background": 0, "lesions": [1, 2], "exudates": 2, "ignore": 3}),
}
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [4, 8, 8],
        "conv_op": "torch.nn.Conv2d",
        "kernel_sizes": [[3, 3]] * 3,
        "strides": [[1, 1], [2, 2], [2, 2]],
        "n_conv_per_stage": [1] * 3,
        "n_conv_per_stage_decoder": [1] * 2,
        "conv_bias": True,
        "norm_op": "torch.nn.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
PLANS = {
    "dataset_name": "Dataset001_Tiny",
    "plans_name": "plans",
    "label_manager": "LabelManager",
    "image_reader_writer": "NaturalImage2DIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "continue_training": False,
    "configurations": {
        "2d": {
            "data_identifier": "tiny",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [64, 64],
            "spacing": [1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            "batch_dice": True,
            "architecture": ARCHITECTURE,
        }
    },
}


class Step(NamedTuple):
    """A training step: what nnU-Net gave the criterion, the tapped features, and what came out."""

    logits: Any
    target: Any
    features: torch.Tensor
    terms: LossTerms


@pytest.fixture
def trainer(request, tmp_path, monkeypatch):
    """What makes trainers of a case, with methods of the test's own, on five images that nnU-Net takes for its own."""
    name, labels = CASES[getattr(request, "param", "labels")]
    for variable, value in (
        ("nnUNet_raw", tmp_path),
        ("nnUNet_preprocessed", tmp_path),
        ("nnUNet_results", tmp_path / "results"),
        ("nnUNet_extTrainer", tmp_path / "trainers"),
        ("nnUNet_n_proc_DA", 0),
    ):
        monkeypatch.setenv(variable, str(value))
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers/contrast.py").write_text("\n\n".join(BLOCKS))
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    folder = tmp_path / PLANS["dataset_name"]
    (folder / "tiny").mkdir(parents=True)
    (folder / "dataset_fingerprint.json").write_text("{}")
    numbers = np.random.default_rng(0)
    for number in range(5):
        mask = np.zeros((1, 1, 64, 64), np.int8)
        mask[..., 10:20, 10:25], mask[..., 40:50, 30:50] = 1, 2
        where = {label: np.argwhere(mask == label) for label in (1, 2)} | {(1, 2): np.argwhere(mask > 0)}
        if "ignore" in labels:
            mask[..., 45:, :] = 3
            where[-1, 0, 1, 2] = np.argwhere(mask != 3)  # annotated
        image = numbers.normal(size=mask.shape).astype(np.float32) + mask
        nnUNetDatasetBlosc2.save_case(image, mask, {"class_locations": where}, str(folder / f"tiny/{number}"))
    dataset = {"channel_names": {"0": "grey"}, "labels": labels, "regions_class_order": [1, 2], "file_ending": ".png"}
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002, of nnU-Net's own draws

    def made(**methods):
        kind = recursive_find_trainer_class_by_name(name)
        trainer = type(kind.__name__, (kind,), methods)(copy.deepcopy(PLANS), "2d", 0, dataset, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 6, 1
        return trainer

    return made


def trained(trainer, monkeypatch):
    """The steps of nnU-Net's own loop: an epoch of training, validation and checkpoints."""
    given, given_features, found = [], [], []
    terms = CombinedExudateLoss.terms

    def recorded(criterion, *arguments):
        given_features.append(criterion.tap.features)
        found.append(terms(criterion, *arguments))
        return found[-1]

    monkeypatch.setattr(CombinedExudateLoss, "terms", recorded)
    if not trainer.was_initialized:
        trainer.initialize()
    trainer.loss.register_forward_pre_hook(lambda _, arguments: given.append(arguments), prepend=True)
    trainer.run_training()
    steps = [Step(*one, *rest) for one, *rest in zip(given, given_features, found, strict=True)]
    return [step for step in steps if step.terms.total.requires_grad]


def masks_of(target, labels):
    """The masks that the terms are to see, made of nnU-Net's finest target, and the value that is ignored there."""
    value = labels.get("ignore", -1)
    if "lesions" in labels:
        masks, ignored = target[:, :2].long(), target[:, 2:].any(1, keepdim=True)
    else:
        masks, ignored = torch.cat([target == 1, target == 2], 1).long(), target == value
    return masks.masked_fill(ignored, value), value


@pytest.mark.parametrize("trainer", CASES, indirect=True)
def test_a_training_adds_the_edge_term_to_nnunets_own_loss(trainer, request, monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    made = trainer()
    steps = trained(made, monkeypatch)
    assert len(steps) == 6
    own, (_, labels) = nnUNetTrainer._build_loss(made), CASES[request.node.callspec.params["trainer"]]
    for step in steps:
        masks, value = masks_of(step.target[0], labels)
        edge = PatchEdgeContrastLoss(ignore_index=value)(step.features, masks)
        torch.testing.assert_close(step.terms.edge, edge)
        torch.testing.assert_close(step.terms.supervised, own(step.logits, step.target))
        torch.testing.assert_close(step.terms.total, step.terms.supervised + step.terms.beta * edge)
    assert steps[-1].terms.beta > 0
    assert steps[-1].terms.total < steps[1].terms.total


def test_a_resumed_training_goes_on_with_the_same_weight(trainer, monkeypatch):
    first = trainer()
    trained(first, monkeypatch)
    again = trainer()
    again.load_checkpoint(f"{first.output_folder}/checkpoint_final.pth")
    again.network.train()
    batch = next(first.dataloader_train)
    losses = [trainer.train_step(batch)["loss"].item() for trainer in (first, again)]
    assert losses[0] == losses[1]
    assert first.loss.state_dict()["pull"].any()
    assert torch.equal(first.loss.state_dict()["pull"], again.loss.state_dict()["pull"])


def test_a_checkpoint_of_nnunets_own_trainer_can_be_gone_on_with(trainer, monkeypatch):
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    own = nnUNetTrainer(**trainer().my_init_kwargs | {"plans": copy.deepcopy(PLANS)})
    own.num_epochs, own.num_iterations_per_epoch, own.num_val_iterations_per_epoch = 1, 1, 1
    own.run_training()
    again = trainer()
    again.num_epochs = 2
    again.load_checkpoint(f"{own.output_folder}/checkpoint_final.pth")
    assert trained(again, monkeypatch)[-1].terms.beta > 0


def test_nnunets_compiled_network_and_loss_train(trainer, monkeypatch):
    torch.compiler.reset()
    made = trainer(_do_i_compile=lambda self: True)
    steps = trained(made, monkeypatch)
    assert isinstance(made.network, torch._dynamo.OptimizedModule)
    assert steps[-1].terms.beta > 0
    assert steps[-1].terms.total < steps[1].terms.total


def test_the_trained_network_predicts_whole_images(trainer, monkeypatch):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    made = trainer()
    trained(made, monkeypatch)
    made.set_deep_supervision_enabled(False)
    made.network.eval()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    axes = made.inference_allowed_mirroring_axes
    predictor.manual_initialization(
        made.network, made.plans_manager, made.configuration_manager, None, made.dataset_json, TRAINER, axes
    )
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, 1, 100, 80))
    assert logits.shape == (3, 1, 100, 80)


def test_the_glue_has_at_most_12_lines():
    (glue,) = re.findall(rf"(?m)^class {TRAINER}\(.*\Z", BLOCKS[0], re.DOTALL)
    assert len([line for line in glue.splitlines() if line]) <= 12
