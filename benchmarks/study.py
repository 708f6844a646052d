"""Does it help? The runs of docs/protocol.md, one after the other; each appends a line to a file.

    python benchmarks/study.py --data PATH --question a

A run whose line is in the file is not repeated, and a run that another process is doing is left to it, so the work can
be spread over days, or over as many processes as there are processors; summary.py reads the file.
Every arm of a seed begins with the same weights and sees the same crops. A seed holds out a fifth of the training
photographs, on which the curve is measured; the test photographs are evaluated once, at the end, and not at all if the
question is one of choice.
"""

import argparse
import contextlib
import dataclasses
import datetime
import fcntl
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data.idrid import DataError
from data.photographs import augmented_crops, train_validation_split
from measure.arguments import whole_number
from measure.cost import PeakMemory, quartiles
from measure.machine import environment
from torch import Tensor
from tqdm import tqdm
from trials.evaluation import best_thresholds, evaluation
from trials.networks import network
from trials.objective import Objective, gradient_norms
from trials.questions import QUESTIONS, Question
from trials.record import RESULTS, file_name, read_lines, runs_of
from trials.samples import samples_of
from trials.similarity import band_similarity

LEARNING_RATE, WARM_UP = 1e-3, 50
CURVE_EVERY, NORMS_EVERY = 150, 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is missing of a question; the process's exit code."""
    options = _parsed(arguments)
    question = QUESTIONS[options.question]
    torch.set_num_threads(options.threads)
    try:
        commit = _commit()  # of what has been imported, whatever is checked out later
        for name, seed in _missing(question, options):
            figures = run(name, question, seed, options.data, options.cache)
            line = {"arm": name, "seed": seed, "tested": question.tested, "device": question.device, "commit": commit}
            with options.results.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(line | figures) + "\n")
    except DataError as error:
        print(f"study.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(name: str, question: Question, seed: int, data: Path, cache: Path) -> dict[str, Any]:
    """The figures of one run of an arm, ready for JSON; the cache keeps its network."""
    settings, device = question.arms[name], torch.device(question.device)
    train, validation = train_validation_split(samples_of(settings, data, "train", cache), seed)
    model = network(settings.network, len(settings.lesions), seed).to(device)
    objective = Objective(settings, model)
    parameters = [*model.parameters(), *(objective.projection.parameters() if objective.projection else ())]
    optimizer = torch.optim.Adam(parameters, LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i / settings.steps, i))
    generator = torch.Generator().manual_seed(seed)
    memory, peak = PeakMemory(device), None
    seconds, loss_seconds, losses = [], [], []
    norms: list[dict[str, Any]] = []
    curve: list[dict[str, Any]] = []
    active = {"density": 0, "edge": 0}
    similarity = [band_similarity(model, validation, settings)]
    for step in tqdm(range(settings.steps), desc=f"{name}, seed {seed}", mininterval=30):
        crops = augmented_crops(train, settings.batch, settings.crop, generator)
        images, masks = (tensor.to(device) for tensor in crops)
        begin = _now(device)
        logits = model(images.contiguous(memory_format=torch.channels_last))
        before = _now(device)
        features = objective.tap.features if objective.tap else None
        terms = objective.terms(logits, masks, step / settings.steps)
        loss_seconds.append(_now(device) - before)
        measured = 0.0
        if features is not None and step % NORMS_EVERY == 0:
            before = _now(device)
            norms.append({"step": step, **_norms(terms, features, next(model.parameters()))})
            measured = _now(device) - before
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        schedule.step()
        seconds.append(_now(device) - begin - measured)
        losses.append([float(value.detach()) for value in terms])
        for part in active:
            active[part] += float(getattr(terms, part).detach()) > 0
        if not curve:  # before whole photographs take more
            peak = memory.read()
        if (step + 1) % CURVE_EVERY == 0 or step + 1 == settings.steps:
            scores = evaluation(model, validation, settings)
            del scores["photographs"]
            curve.append({"step": step + 1, **scores})
            model.train()
    thresholds = best_thresholds(curve[-1]["f1_by_threshold"])
    fold = evaluation(model, validation, settings, thresholds)["tuned"]
    similarity.append(band_similarity(model, validation, settings))
    figures: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment(device),
        "curve": curve,
        "fold": fold,
        "losses": _means(losses, NORMS_EVERY),
        "active": {part: count / settings.steps for part, count in active.items()},
        "gradient_norms": norms,
        "similarity": similarity,
        "step_seconds": quartiles(seconds)._asdict(),
        "loss_forward_seconds": quartiles(loss_seconds)._asdict(),
        "peak_memory_bytes": peak,
    }
    if question.tested:
        test = samples_of(settings, data, "test", cache)
        figures["test"] = evaluation(model, test, settings, thresholds)
    networks = cache / "networks"
    networks.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), networks / f"{file_name(name, question, seed)}.pt")
    return figures


def _now(device: torch.device) -> float:
    """Seconds by the clock, once the device has done what it has been given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _norms(terms: Any, features: Tensor, weight: Tensor) -> dict[str, dict[str, float]]:
    return {"features": gradient_norms(terms, features), "first_layer": gradient_norms(terms, weight)}


def _means(losses: list[list[float]], every: int) -> list[list[float]]:
    """Total, supervised, density and edge, each the mean over some steps."""
    return [np.mean(losses[i : i + every], 0).round(5).tolist() for i in range(0, len(losses), every)]


def _rate(progress: float, step: int) -> float:
    """Of the learning rate: rises over the first steps, then falls to 0 on a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * min(progress, 1))) / 2


def _missing(question: Question, options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Arm and seed of the runs that the file does not hold and no other process is at, seed by seed."""
    claims = options.cache / "claims"
    claims.mkdir(parents=True, exist_ok=True)
    for seed, name in itertools.product(question.seeds[: options.seeds], question.arms):
        with (claims / file_name(name, question, seed)).open("w") as claim, contextlib.suppress(BlockingIOError):
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go when the process ends, however it does
            if seed not in [run["seed"] for run in runs_of(name, question, read_lines(options.results))]:
                yield name, seed


def _commit() -> str:
    """The last commit that changed code, with a plus where code has been changed since."""
    # In a pattern of git the star matches slashes too, so this one finds the code of the packages.
    code = ["--", ":(top)contrastive_exudate_loss", ":(top)benchmarks/*.py"]
    last, changed = (
        subprocess.run(["git", *command, *code], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        for command in (["log", "-1", "--format=%h"], ["status", "--porcelain"])
    )
    return last.stdout.strip() + ("+" if changed.stdout else "")


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="PATH", help="the data set's folder")
    parser.add_argument("--question", choices=QUESTIONS, required=True, help="which runs: see docs/protocol.md")
    parser.add_argument("--seeds", type=whole_number(1), metavar="N", help="only the first N seeds")
    parser.add_argument(
        "--threads", type=whole_number(1), default=1, help="threads of each process (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, metavar="FILE", help="file of the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".study"), metavar="FOLDER", help="where to keep images and networks"
    )
    options = parser.parse_args(arguments)
    if QUESTIONS[options.question].device == "cuda" and not torch.cuda.is_available():
        parser.error(f"question {options.question} needs CUDA, but PyTorch finds no CUDA device")
    return options


if __name__ == "__main__":
    sys.exit(main())
