"""The command line of train.py, checked."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from data.idrid import LESIONS
from measure.arguments import device, picture_file, whole_number, writable_file
from measure.machine import process_count

# The network halves its input three times.
UNET_STRIDE = 8
# Pixels of a real photograph's short side, unless --size says otherwise.
SIZE = 512


def parsed(arguments: Sequence[str] | None, help_text: str) -> argparse.Namespace:
    """The options; the program ends with one sentence and exit code 2 where they make no sense.

    Args:
        arguments: None takes those of the process.
        help_text: what --help says first.

    Returns:
        data, lesion, size, steps, batch, crop, norm, seed, device, alpha, beta, patch_size, output, json, save,
        eval_only, images, masks; lesion is None without data, size without data or images, alpha and beta where the
        constructor's holds.
    """
    parser = argparse.ArgumentParser(description=help_text, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_data_options(parser)
    _add_training_options(parser)
    _add_output_options(parser)
    _add_evaluation_options(parser)
    options = parser.parse_args(arguments)
    evaluation = options.eval_only, options.images, options.masks
    if any(value is None for value in evaluation) and any(value is not None for value in evaluation):
        parser.error("--eval-only, --images and --masks belong together: give all three or none")
    if options.eval_only is not None:
        for name in ("data", "lesion", "steps", "batch", "crop", "norm", "seed", "alpha", "beta", "save"):
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--{name} is for training, but --eval-only trains nothing")
        options.size = options.size or SIZE
        return options
    if options.batch % process_count():
        parser.error(f"--batch must be a multiple of the {process_count()} processes, got {options.batch}")
    if options.data is not None:
        options.lesion, options.size = options.lesion or "EX", options.size or SIZE
        return options
    for name in ("lesion", "size"):
        if getattr(options, name) is not None:
            parser.error(f"--{name} is for real photographs only; give their folder with --data")
    return options


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, metavar="PATH", help="IDRiD's folder (default: draw photographs)")
    data.add_argument("--lesion", choices=sorted(LESIONS), help="which mask of --data to learn (default: EX)")
    data.add_argument(
        "--size",
        type=whole_number(32),
        metavar="PIXELS",
        help=f"reduce the short side of --data's or --images' to this (default: {SIZE})",
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=whole_number(1), default=600, help="training steps (default: %(default)s)")
    training.add_argument(
        "--batch", type=whole_number(1), default=8, help="crops per step, over all processes (default: %(default)s)"
    )
    training.add_argument(
        "--crop",
        type=whole_number(16, multiple_of=UNET_STRIDE),
        default=64,
        metavar="PIXELS",
        help=f"side of a crop, a multiple of {UNET_STRIDE} (default: %(default)s)",
    )
    training.add_argument(
        "--norm",
        choices=("batch", "group"),
        default="batch",
        help="normalisation layers of the network (default: %(default)s)",
    )
    training.add_argument(
        "--seed", type=whole_number(0), default=0, help="seed of weights, crops and drawings (default: %(default)s)"
    )
    training.add_argument(
        "--device",
        type=device,
        default="auto",
        help="auto (the default: cuda where there is one), cpu, cuda, cuda:1, ...",
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument("--alpha", type=_weight, help="weight of the density term (default: the constructor's, 0)")
    loss.add_argument("--beta", type=_weight, help="weight of the edge term (default: the constructor's, Pull(2.0))")
    loss.add_argument(
        "--patch-size",
        type=whole_number(1),
        default=16,
        metavar="PIXELS",
        help="side of a patch (default: %(default)s)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", type=picture_file, default="train.png", metavar="PNG", help="picture (default: %(default)s)"
    )
    output.add_argument("--json", type=writable_file, metavar="FILE", help="file for the figures (default: none)")
    output.add_argument("--save", type=writable_file, metavar="FILE", help="file for the networks (default: none)")


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    evaluation = parser.add_argument_group("evaluation of saved networks on other photographs, without training")
    evaluation.add_argument("--eval-only", type=Path, metavar="FILE", help="networks that --save has written")
    evaluation.add_argument("--images", type=Path, metavar="DIR", help="photographs")
    evaluation.add_argument(
        "--masks",
        type=Path,
        metavar="DIR",
        help="lesion masks, named like the photographs, such as C01_EX.png for C01.jpg; or HEI-MED's folder DMED",
    )


def _weight(text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {text!r}")
    return weight
