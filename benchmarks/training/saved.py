"""How saved networks do on photographs of any other data set."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import torch
from data.idrid import DataError
from data.samples import Sample
from measure.lesion_scores import counts, metrics
from measure.markdown import aligned
from torch import Tensor, nn

from training.pixel_scores import Scores

ROWS = {
    "f1": "F1, mean over photographs with a lesion",
    "iou": "IoU, mean over photographs with a lesion",
    "f1_pixels": "F1, all pixels",
    "iou_pixels": "IoU, all pixels",
    "average_precision": "average precision, all pixels",
    "small_recall": "small-lesion recall",
    "boundary_f1": "boundary F1, mean over photographs with a lesion",
}


def save(path: Path, norm: str, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write the weights of each arm's network and what it takes to make the networks again."""
    torch.save({"norm": norm, "states": {name: dict(state) for name, state in states.items()}}, path)


def saved_networks(path: Path, make: Callable[[str], nn.Module]) -> dict[str, nn.Module]:
    """The networks that save has written, by arm; make(norm) gives one without its weights.

    Raises:
        DataError: the file is none that save has written.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or not {"norm", "states"} <= saved.keys():
            raise ValueError("it holds something else")
        networks = {}
        for name, state in saved["states"].items():
            networks[name] = make(saved["norm"])
            networks[name].load_state_dict(state)
    except Exception as error:  # a file may be broken in as many ways as torch.load has errors
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"--eval-only must be a file that --save has written, but '{path}' is not: {reason}") from error
    return networks


def lesion_metrics(probabilities: Sequence[Tensor], samples: Sequence[Sample], scored: Scores) -> dict[str, float]:
    """Metrics of ROWS at probability 0.5, from (H, W) probabilities; average precision is that of the scores."""
    found = [
        counts(np.asarray(probability > 0.5), np.asarray(sample.lesion), np.zeros(sample.lesion.shape, bool))
        for probability, sample in zip(probabilities, samples, strict=True)
    ]
    values: dict[str, SupportsFloat] = {**metrics(found), "average_precision": scored.average_precision}
    return {name: float(values[name]) for name in ROWS}  # there is no optic disc


def evaluation_table(arms: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table with a column for each arm."""
    rows = [[label, *(f"{arm[key]:.3f}" for arm in arms.values())] for key, label in ROWS.items()]
    return aligned([["", *arms], *rows])
