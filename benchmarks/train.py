"""What the edge term changes: one small U-Net trained with BCE, with Dice + BCE, and with CombinedExudateLoss on these.

All three begin with the same weights and see the same crops in the same order.
Unless --alpha and --beta say otherwise, the weights are the constructor's: the edge term sets its own.
Without --data the photographs are drawn (data/synthetic.py); with it they are IDRiD's (data/idrid.py).
Prints a table, and writes one PNG and, if asked, the figures as JSON.

    python benchmarks/train.py
    python benchmarks/train.py --alpha 0.02 --beta 0.1  # the paper's weights
    python benchmarks/train.py --data "A. Segmentation" --lesion EX --json figures.json
    torchrun --nproc-per-node 2 benchmarks/train.py --norm group
    python benchmarks/train.py --data "A. Segmentation" --save networks.pt
    python benchmarks/train.py --eval-only networks.pt --images photographs --masks lesions

With torchrun each process trains on its share of every batch, the contrast is over the whole batch, and the first
process evaluates and writes. With group norm the loss curve of BCE equals that of one process, up to rounding; batch
norm and Dice are computed on each share separately.

With --eval-only nothing is trained: the networks that --save has written are evaluated on other photographs, reduced
like --data's. A photograph without a mask counts as having no lesion.

F1 and IoU (at probability 0.5) and average precision are over all pixels of all held-out photographs together.
Small-lesion recall is the share of all lesions under 25 pixels that the prediction touches.
Seconds per step (median and quartiles) are of forward, loss, backward and optimiser, not of cutting the crops out.
The loss's share of a step is measured on further steps, after the training and the evaluation: see loss_share in
measure/cost.py. Peak memory is that of the training steps: see PeakMemory there.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from data.folders import paired_files
from data.idrid import DataError, Files, read_samples, split_files
from data.samples import Sample, random_batch
from data.synthetic import fundus_samples
from measure.cost import PeakMemory, loss_share, quartiles, timed
from torch import Tensor, nn
from tqdm import tqdm
from training.command_line import UNET_STRIDE, parsed
from training.picture import write_picture
from training.pixel_scores import average_precision_thresholds, predictions, scores
from training.ranks import averaging_gradients, mean_of_processes, own_share, process_group, rank
from training.report import Arm, Data, figures, table
from training.saved import evaluation_table, lesion_metrics, save, saved_networks

from contrastive_exudate_loss import CombinedExudateLoss, FeatureTap, PatchDensityContrastLoss, PatchEdgeContrastLoss

TRAINING_IMAGES, HELD_OUT_IMAGES = 48, 20
ARMS = BCE, DICE, CONTRAST = "BCE", "Dice + BCE", "Dice + BCE + contrast"
PRIOR_LOGIT = -4.0
NORM_GROUPS = 8
LEARNING_RATE = 1e-3
SHARE_STEPS = 13


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison that the command line asks for; the process's exit code."""
    options = parsed(arguments, __doc__ or "")
    with process_group(options.device), contextlib.redirect_stdout(io.StringIO() if rank() else sys.stdout):
        try:
            return _compared(options) if options.eval_only is None else _evaluated(options)
        except DataError as error:
            print(f"train.py: error: {error}", file=sys.stderr)
            return 2


def _compared(options: argparse.Namespace) -> int:
    data = _synthetic_data(options) if options.data is None else _idrid_data(options)
    model = _network(options.seed, options.norm).to(options.device)
    arms, predicted, states = {}, {}, {}
    for name in ARMS:
        arms[name], predicted[name], states[name] = _trained(name, copy.deepcopy(model), options, data)
    if rank():
        return 0
    print(table(arms, data))
    criterion = _contrastive(options)
    print(f"{CONTRAST}: alpha {criterion.alpha}, beta {criterion.beta}; {options.steps} steps")
    f1 = {name: arm.scores.f1 for name, arm in arms.items()}
    write_picture(options.output, data.held_out, predicted, f1, criterion)
    print(f"picture: {options.output}")
    if options.json is not None:
        options.json.write_text(json.dumps(figures(options, data, arms), indent=2) + "\n")
        print(f"figures: {options.json}")
    if options.save is not None:
        save(options.save, options.norm, states)
        print(f"networks: {options.save}")
    return 0


def _evaluated(options: argparse.Namespace) -> int:
    networks = saved_networks(options.eval_only, lambda norm: _network(options.seed, norm))
    samples = _read(paired_files(options.images, options.masks), options.size, "photographs")
    arms, predicted = {}, {}
    for name, model in networks.items():
        predicted[name] = predictions(model.to(options.device), samples, UNET_STRIDE, options.device)
        scored = scores(predicted[name], samples, average_precision_thresholds(samples))
        arms[name] = lesion_metrics(predicted[name], samples, scored)
    print(f"photographs: {len(samples)}, with lesion: {sum(bool(sample.lesion.any()) for sample in samples)}")
    print(evaluation_table(arms))
    write_picture(
        options.output, samples, predicted, {n: arm["f1_pixels"] for n, arm in arms.items()}, _contrastive(options)
    )
    print(f"picture: {options.output}")
    if options.json is not None:
        options.json.write_text(json.dumps(arms, indent=2) + "\n")
        print(f"figures: {options.json}")
    return 0


def _trained(
    name: str, model: nn.Module, options: argparse.Namespace, data: Data
) -> tuple[Arm, list[Tensor], dict[str, Tensor]]:
    """What one training gave, its held-out lesion probabilities, and the weights behind them."""
    tap = FeatureTap(model) if name == CONTRAST else None
    plain: dict[str, Callable[..., Tensor]] = {BCE: nn.BCEWithLogitsLoss(), DICE: dice_and_bce}
    criterion = plain[name] if tap is None else _contrastive(options, tap)
    step = _training_step(averaging_gradients(model), criterion, options.steps)
    batches = _batches(data.train, options)
    memory, seconds, losses = PeakMemory(options.device), [], []
    with tqdm(range(options.steps), desc=f"training, {name}", unit="step", disable=_silent()) as progress:
        for _ in progress:
            loss, elapsed = timed(options.device, step, *next(batches))
            seconds.append(elapsed)
            losses.append(mean_of_processes(loss))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    peak = memory.read()
    judged = [] if rank() else data.held_out
    predicted = predictions(model, judged, UNET_STRIDE, options.device)
    scored = scores(predicted, judged, average_precision_thresholds(judged))
    state = copy.deepcopy(model.state_dict())  # the next steps go on training
    share = loss_share(step, model.train(), criterion, tap, itertools.islice(batches, SHARE_STEPS))
    return Arm(scored, quartiles(seconds), share, peak, memory.meaning, losses), predicted, state


def _network(seed: int, norm: str) -> nn.Module:
    """A small U-Net with weights drawn from the seed, whose logits begin near the lesions' prior."""
    torch.manual_seed(seed)
    model: nn.Module = smp.Unet(
        "resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(64, 32, 16), in_channels=3, classes=1
    )
    for module in list(model.modules()) if norm == "group" else ():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(NORM_GROUPS, child.num_features))
    nn.init.constant_(model.get_parameter("segmentation_head.0.bias"), PRIOR_LOGIT)
    return model


def dice_and_bce(logits: Tensor, target: Tensor) -> Tensor:
    """segmentation-models-pytorch's Dice plus BCE."""
    dice: Tensor = smp.losses.DiceLoss("binary")(logits, target)
    return dice + F.binary_cross_entropy_with_logits(logits, target)


def _contrastive(options: argparse.Namespace, tap: FeatureTap | None = None) -> CombinedExudateLoss:
    """Dice + BCE with the terms, at the constructor's weights where the options give none."""
    weights = {name: getattr(options, name) for name in ("alpha", "beta") if getattr(options, name) is not None}
    return CombinedExudateLoss(
        **weights,
        supervised=dice_and_bce,
        density=PatchDensityContrastLoss(options.patch_size, gather_distributed=True),
        edge=PatchEdgeContrastLoss(options.patch_size, gather_distributed=True),
        features=tap,
    )


def _training_step(
    model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], steps: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Trains on (images, target) once and gives the loss; the learning rate falls to 0 over the steps on a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * min(i / steps, 1))) / 2)

    def step(images: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(images), target)
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step


def _batches(samples: Sequence[Sample], options: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops on the device without end, in the order that the seed gives; of each batch this process's share."""
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        images, target = random_batch(samples, options.batch, options.crop, generator)
        yield own_share(images).to(options.device), own_share(target).to(options.device)


def _synthetic_data(options: argparse.Namespace) -> Data:
    train = fundus_samples(TRAINING_IMAGES, options.seed, stream=0)
    held_out = fundus_samples(HELD_OUT_IMAGES, options.seed, stream=1)
    print(f"synthetic photographs: {len(train)} for training, {len(held_out)} held out")
    return Data(train, held_out)


def _idrid_data(options: argparse.Namespace) -> Data:
    train, held_out = (split_files(options.data, split, options.lesion) for split in ("train", "test"))
    masks = [sum(files.mask is not None for files in split) for split in (train, held_out)]
    print(
        f"{options.lesion} masks: {masks[0]} of {len(train)} training photographs have one, "
        f"{masks[1]} of {len(held_out)} held-out photographs; the others count as without lesion"
    )
    return Data(_read(train, options.size, "training"), _read(held_out, options.size, "held out"))


def _read(files: list[Files], size: int, what: str) -> list[Sample]:
    with tqdm(
        read_samples(files, size), desc=f"reading, {what}", total=len(files), unit="image", disable=_silent()
    ) as progress:
        return list(progress)


def _silent() -> bool | None:
    """None leaves the choice to tqdm."""
    return True if rank() else None


if __name__ == "__main__":
    sys.exit(main())
