"""The questions that run.py measures an answer to, each a list of rows."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from measure.cost import extra_memory, ratio, side_by_side, spread
from measure.machine import free_memory
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor, nn

from contrastive_exudate_loss import (
    CombinedExudateLoss,
    FeatureTap,
    PatchDensityContrastLoss,
    PatchEdgeContrastLoss,
    Pull,
)
from overhead.alternatives import PATCH, TEMPERATURE, band_count, floor, plain_contrast, plain_terms
from overhead.plan import Plan
from overhead.published_loop import published_loop
from overhead.workloads import Batch, drawn_batch, pixels_as_patches

Row = dict[str, Any]
Tick = Callable[[str], None]
PRECISIONS = ("float32", "autocast")


def overhead(plan: Plan, tick: Tick) -> list[Row]:
    """Each loss, eager and compiled, in float32 and under autocast, against plain BCE and against the floor."""
    rows = []
    for precision in PRECISIONS:
        half = precision == "autocast"
        dtype = torch.bfloat16 if half else torch.float32
        batch = drawn_batch(plan.image, plan.device, channels=plan.channels, dtype=dtype, seed=plan.seed)
        patches = len(batch.target) * math.prod(-(-side // PATCH) for side in plan.image)
        cross_entropy = _step(nn.BCEWithLogitsLoss(), batch[:2], half)
        works = {("floor", "eager"): floor(cross_entropy, batch.features, [patches, band_count(batch.target)])}
        failures = {}
        for mode in ("eager", "compiled"):
            for name, criterion, inputs in _losses(batch):
                if mode == "compiled" and name not in plan.compiled:
                    continue
                tick(f"{name}, {mode}, {precision}")
                work = _step(criterion if mode == "eager" else torch.compile(criterion, fullgraph=True), inputs, half)
                try:
                    work()
                except torch._dynamo.exc.TorchDynamoException as error:
                    failures[name, mode] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                else:
                    works[name, mode] = work
        tick(f"side by side, {precision}")
        seconds = _seconds(plan, works)
        for (name, mode), work in works.items():
            tick(f"memory, {name}, {mode}, {precision}")
            rows.append(
                {
                    "work": name,
                    "mode": mode,
                    "precision": precision,
                    "seconds": _spread(seconds[name, mode]),
                    "to_bce": _ratio(seconds[name, mode], seconds["BCE", "eager"]),
                }
                | ({"to_floor": _ratio(seconds[name, mode], seconds["floor", "eager"])} if name == "combined" else {})
                | (_memory(plan.device, work, batch.features, name != "BCE") if name != "floor" else {})
            )
        rows += [{"work": n, "mode": m, "precision": precision, "failure": text} for (n, m), text in failures.items()]
        torch.compiler.reset()
    return rows


def otherwise(plan: Plan, tick: Tick) -> list[Row]:
    """The losses against what one would otherwise run: the published code's manner, and multiplying and pooling."""
    rows = []
    size = (plan.loop_side, plan.loop_side)
    batch = drawn_batch(size, plan.device, area=0.02, seed=plan.seed)
    tick("the published code's manner")
    works = {
        "combined, published configuration": _step(CombinedExudateLoss.hecl(), batch),
        "the same, patch by patch in Python": _step(_published, batch),
    }
    rows += _compared(plan, works, batch)
    batch = drawn_batch(plan.image, plan.device, channels=plan.channels, seed=plan.seed)
    tick("multiply and pool")
    works = {
        "combined, defaults": _step(CombinedExudateLoss.paper(), batch),
        "the same, multiplied and pooled": _step(_plain, batch),
    }
    return rows + _compared(plan, works, batch)


def inference(plan: Plan, tick: Tick) -> list[Row]:
    """A forward pass in eval mode and without gradients, with and without a tap on the model."""
    images = torch.rand(plan.training[0], 3, plan.training[1], plan.training[1], device=plan.device)
    models = {name: _network("resnet18", plan).eval() for name in ("without a tap", "with a tap")}
    tap = FeatureTap(models["with a tap"], layer="segmentation_head.0")
    works = {name: _without_gradients(model, images) for name, model in models.items()}
    tick("inference")
    seconds = _seconds(plan, works)
    rows = []
    for name, work in works.items():
        peak, kept = extra_memory(plan.device, work, tap.take if name == "with a tap" else None)
        rows.append(
            {
                "work": name,
                "seconds": _spread(seconds[name]),
                "to_untapped": _ratio(seconds[name], seconds["without a tap"]),
                "extra_memory_bytes": peak,
                "kept_bytes": kept,
            }
        )
    tap.close()
    return rows


def training_step(plan: Plan, tick: Tick) -> list[Row]:
    """A whole training step with BCE and with the combined loss, and the loss alone on detached outputs."""
    rows = []
    for encoder in plan.encoders:
        tick(f"training step, {encoder}")
        images, target = _images(plan)
        plain, tapped = (_network(encoder, plan) for _ in range(2))
        tap = FeatureTap(tapped)
        criterion = CombinedExudateLoss.paper(features=tap)
        works = {
            "step, BCE": _training(plain, nn.BCEWithLogitsLoss(), images, target),
            "step, combined": _training(tapped, criterion, images, target),
        }
        logits = tapped(images).detach().requires_grad_()
        batch = Batch(logits, target, tap.take().detach().requires_grad_())
        works |= {
            "BCE alone": _step(F.binary_cross_entropy_with_logits, batch[:2]),
            "combined alone": _step(CombinedExudateLoss.paper(), batch),
        }
        seconds = _seconds(plan, works)
        for name in works:
            rows.append(
                {
                    "model": f"Unet, {encoder}",
                    "work": name,
                    "seconds": _spread(seconds[name]),
                    "share_of_step": _ratio(seconds[name], seconds["step, combined"]),
                }
            )
    return rows


def pull(plan: Plan, tick: Tick) -> list[Row]:
    """What a weight that sets itself adds to a training step, timed in it and in the last layer and the loss alone."""
    tick("pull")
    images, target = _images(plan)
    works: dict[str, Callable[[], object]] = {}
    for name, beta in (("beta 0.02", 0.02), ("Pull(1.0)", Pull(1.0))):
        model = _network("resnet18", plan)
        works[f"step, {name}"] = _training(model, CombinedExudateLoss(beta=beta, features=model), images, target)
        layer = copy.deepcopy(model.get_submodule("segmentation_head.0"))
        features = torch.rand((len(images), 16, *images.shape[2:]), device=plan.device, requires_grad=True)
        works[f"last layer and loss, {name}"] = _last_layer(layer, beta, features, target)
    for work in works.values():
        for _ in range(plan.settled):
            work()
    seconds = side_by_side(plan.device, works, 5 * plan.budget)  # a small difference takes many rounds
    rows = []
    for part in ("step", "last layer and loss"):
        number, pulled = (seconds[f"{part}, {name}"] for name in ("beta 0.02", "Pull(1.0)"))
        added = [(b - a) / step for a, b, step in zip(number, pulled, seconds["step, beta 0.02"], strict=True)]
        rows += [
            {"work": f"{part}, beta 0.02", "seconds": _spread(number)},
            {"work": f"{part}, Pull(1.0)", "seconds": _spread(pulled), "added_to_step": _spread(added)},
        ]
    return rows


def growth(plan: Plan, tick: Tick) -> list[Row]:
    """How the combined loss grows, one size at a time, beside BCE on the same logits."""
    rows = []
    side = plan.growth_side
    for axis, values in plan.growth.items():
        for value in values:
            tick(f"growth, {axis} {value}")
            # A whole photograph is large: sides are measured one image at a time.
            images = 1 if axis == "side" else value if axis == "batch" else 4
            batch = drawn_batch(
                value if axis == "side" else (side, side),
                plan.device,
                images=images,
                channels=value if axis == "channels" else 16,
                stride=value if axis == "stride" else 1,
                area=value if axis == "area" else 0.01,
                seed=plan.seed,
            )
            patch = value if axis == "patch_size" else PATCH
            criterion = CombinedExudateLoss(
                0.02, 0.1, density=PatchDensityContrastLoss(patch), edge=PatchEdgeContrastLoss(patch)
            )
            works = {
                "combined": _step(criterion, batch),
                "BCE": _step(F.binary_cross_entropy_with_logits, batch[:2]),
            }
            seconds = _seconds(plan, works)
            rows.append(
                {
                    "axis": axis,
                    "value": list(value) if axis == "side" else value,
                    "patches": images * math.prod(-(-n // patch) for n in batch.target.shape[2:]),
                    "seconds": _spread(seconds["combined"]),
                    "bce_seconds": _spread(seconds["BCE"]),
                    "to_bce": _ratio(seconds["combined"], seconds["BCE"]),
                }
                | _memory(plan.device, works["combined"], batch.features, True)
            )
    return rows


def contrast(plan: Plan, tick: Tick) -> list[Row]:
    """The contrast alone, by this package, with the M x M matrix stored, and by pytorch-metric-learning."""
    rows = []
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "density term, patches of one pixel": PatchDensityContrastLoss(1),
        "M x M matrix stored": _plain_on_pixels,
        "pytorch-metric-learning": _library_on_pixels,
    }
    peaks: dict[str, list[tuple[int, int]]] = {name: [] for name in ways}
    stopped: set[str] = set()
    for count in plan.embeddings:
        batch = pixels_as_patches(count, 16, 0.1, plan.device, plan.seed)
        works, ends = {}, []
        for name, criterion in ways.items():
            tick(f"contrast of {count}, {name}")
            needed = _foreseen(peaks[name], count)
            if name in stopped or needed > free_memory(plan.device) / 4:
                if name not in stopped:
                    ends.append({"work": name, "embeddings": count, "needed_bytes": needed})
                stopped.add(name)
                continue
            works[name] = _step(criterion, (batch.features, batch.target))
        for name, work in works.items():
            peaks[name].append((count, extra_memory(plan.device, work)[0]))
        seconds = _seconds(plan, works)
        for name in works:
            rows.append(
                {
                    "work": name,
                    "embeddings": count,
                    "seconds": _spread(seconds[name]),
                    "to_ours": _ratio(seconds[name], next(iter(seconds.values()))),
                    "extra_memory_bytes": peaks[name][-1][1],
                }
            )
        rows += ends
    return rows


SECTIONS: dict[str, Callable[[Plan, Tick], list[Row]]] = {
    "overhead": overhead,
    "otherwise": otherwise,
    "training_step": training_step,
    "inference": inference,
    "pull": pull,
    "contrast": contrast,
    "growth": growth,
}


def _losses(batch: Batch) -> Iterator[tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]]:
    yield "BCE", nn.BCEWithLogitsLoss(), batch[:2]
    yield "density", PatchDensityContrastLoss(), (batch.features, batch.target)
    yield "edge", PatchEdgeContrastLoss(), (batch.features, batch.target)
    yield "combined", CombinedExudateLoss.paper(), batch


def _step(criterion: Callable[..., Tensor], inputs: Iterable[Tensor], half: bool = False) -> Callable[[], object]:
    given = tuple(inputs)

    def work() -> tuple[Tensor, ...]:
        autocast = torch.autocast(given[0].device.type, torch.bfloat16) if half else contextlib.nullcontext()
        with autocast:
            loss = criterion(*given)
        return torch.autograd.grad(loss, [tensor for tensor in given if tensor.requires_grad])

    return work


def _spread(values: Sequence[float]) -> Row:
    return spread(values)._asdict()


def _ratio(values: Sequence[float], others: Sequence[float]) -> Row:
    return ratio(values, others)._asdict()


def _seconds(plan: Plan, works: Mapping[Any, Callable[[], object]]) -> dict[Any, list[float]]:
    return side_by_side(plan.device, works, plan.budget)


def _memory(device: torch.device, work: Callable[[], object], features: Tensor, used: bool) -> Row:
    """Peak beyond the features' gradient, in bytes and as a share of the features."""
    extra = extra_memory(device, work)[0] - (features.nbytes if used else 0)
    return {"extra_memory_bytes": extra, "extra_memory_to_features": extra / features.nbytes}


def _compared(plan: Plan, works: Mapping[str, Callable[[], object]], batch: Batch) -> list[Row]:
    seconds = _seconds(plan, works)
    first = next(iter(works))
    return [
        {"work": name, "shape": list(batch.features.shape), "seconds": _spread(seconds[name])}
        | {"to_ours": _ratio(seconds[name], seconds[first])}
        | _memory(plan.device, work, batch.features, True)
        for name, work in works.items()
    ]


def _published(logits: Tensor, target: Tensor, features: Tensor) -> Tensor:
    edge, density = published_loop(features, target)
    total: Tensor = F.binary_cross_entropy_with_logits(logits, target) + 0.01 * (edge + density)
    return total


def _plain(logits: Tensor, target: Tensor, features: Tensor) -> Tensor:
    density, edge = plain_terms(features, target)
    return F.binary_cross_entropy_with_logits(logits, target) + 0.02 * density + 0.1 * edge


def _plain_on_pixels(features: Tensor, target: Tensor) -> Tensor:
    return plain_contrast(features.flatten(2)[0].T, target.flatten() > 0)


def _library_on_pixels(features: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = NTXentLoss(temperature=TEMPERATURE)(features.flatten(2)[0].T, target.flatten().long())
    return loss


def _foreseen(peaks: list[tuple[int, int]], count: int) -> int:
    """Bytes that a contrast of count embeddings will need, on the power law through the last two."""
    if len(peaks) < 2:
        return 0
    (m, before), (n, last) = peaks[-2:]
    power = math.log(max(last, 1) / max(before, 1)) / math.log(n / m)
    return int(last * (count / n) ** power)


def _network(encoder: str, plan: Plan) -> nn.Module:
    torch.manual_seed(plan.seed)
    model: nn.Module = smp.Unet(encoder, encoder_weights=None, classes=1)
    return model.to(plan.device)


def _images(plan: Plan) -> tuple[Tensor, Tensor]:
    count, side = plan.training
    target = drawn_batch((side, side), plan.device, images=count, channels=2, seed=plan.seed).target
    generator = torch.Generator().manual_seed(plan.seed)
    return torch.rand((count, 3, side, side), generator=generator).to(plan.device), target


def _training(
    model: nn.Module, criterion: Callable[[Tensor, Tensor], Tensor], images: Tensor, target: Tensor
) -> Callable[[], object]:
    optimizer = torch.optim.Adam(model.parameters())

    def work() -> None:
        optimizer.zero_grad()
        criterion(model(images), target).backward()
        optimizer.step()

    return work


def _last_layer(layer: nn.Module, beta: float | Pull, features: Tensor, target: Tensor) -> Callable[[], object]:
    criterion = CombinedExudateLoss(beta=beta, features=FeatureTap(layer, layer=layer))

    def work() -> object:
        return torch.autograd.grad(criterion(layer(features), target), [features, *layer.parameters()])

    return work


def _without_gradients(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def work() -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(images)
        return logits

    return work
