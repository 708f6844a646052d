"""A soak: random valid calls against the slow reference, random invalid calls against the door.

    python tests/long/soak.py [--valid N] [--invalid N] [--seed S]

Each call comes of a seed of its own, which is printed where it fails: soak.valid_call(seed) repeats it.
"""

import argparse
import itertools
import math
import random
import re
import sys
import traceback
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in ("tests", "benchmarks"))

import reference
from overhead.published_loop import published_loop

import contrastive_exudate_loss
from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss, PatchEdgeContrastLoss

PACKAGE = str(Path(contrastive_exudate_loss.__file__).parent)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
TARGETS = (torch.bool, *INTEGERS, *FLOATS, torch.float8_e5m2, torch.float8_e4m3fn)
LOSSES = {"density": PatchDensityContrastLoss, "edge": PatchEdgeContrastLoss}
# Norm-relative error of values and of gradients, and what of a value may be lost to rounding where it is nearly 0.
TOLERANCE = {
    torch.float64: (1e-9, 1e-9, 1e-11),
    torch.float32: (1e-5, 1e-4, 2e-6),
    torch.float16: (1e-5, 2e-2, 2e-6),
    torch.bfloat16: (1e-5, 2e-2, 2e-6),
}


class Call:
    """A loss, its options and its arguments, all drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.chance = chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.kind = chance.choice(["density", "edge", "combined", "hecl"])
        self.ignore_index = chance.choice([None, None, 255, -1, -100, 2, 300])
        self.dtype = chance.choice(FLOATS)
        shape = chance.randint(1, 3), chance.choice([1, 1, 2]), chance.randint(1, 16), chance.randint(1, 16)
        if self.kind == "hecl":
            shape = (shape[0], 1, 5 * chance.randint(1, 4), 5 * chance.randint(1, 4))
        self.target = self.strided(self.mask(shape))
        size = [chance.choice([n, -(-n // 2), -(-n // 4), chance.randint(1, 20)]) for n in shape[2:]]
        if self.kind == "hecl":
            size = shape[2:]
        self.scale = chance.choice([1.0, 1.0, 1e-2, 1e2])
        features = torch.randn(shape[0], chance.randint(2, 5), *size, generator=self.generator) * self.scale
        self.features = self.strided(features.to(self.dtype)).requires_grad_()
        logits = 5 * torch.randn(shape, generator=self.generator)
        self.logits = self.strided(logits.to(chance.choice([self.dtype, torch.float32]))).requires_grad_()
        self.options = {name: self.drawn_options(name) for name in LOSSES}
        self.weights = chance.choice([(0.02, 0.1), (1.0, 1.0), (0.0, 0.5), (2, 0), (0, 0)])

    def mask(self, shape):
        """A target of any dtype: empty, full, a pixel, blobs or noise; with ignored pixels where its dtype has them."""
        chance = self.chance
        noise = torch.rand(shape, generator=self.generator)
        blobs = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
        mask = chance.choice([noise < 0, noise >= 0, noise == noise.max(), blobs > 0.5, noise < 0.3, noise < 0.9])
        dtype = chance.choice(TARGETS)
        mask = mask.to(torch.int64)
        if dtype != torch.bool and _holds(dtype, self.ignore_index):
            share = chance.choice([0.0, 0.3, 1.0])
            mask[torch.rand(shape, generator=self.generator) < share] = self.ignore_index
        return mask.to(dtype)

    def strided(self, tensor):
        """The same values in another memory layout."""
        way = self.chance.choice(["plain", "plain", "channels_last", "sliced", "transposed"])
        if way == "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last)
        if way == "sliced":
            wide = torch.zeros(*tensor.shape[:3], 2 * tensor.shape[3] + 1, dtype=tensor.dtype)
            wide[..., 1::2] = tensor
            return wide[..., 1::2]
        return tensor.transpose(2, 3).contiguous().transpose(2, 3) if way == "transposed" else tensor

    def drawn_options(self, name):
        """Valid options of a term."""
        chance = self.chance
        options = {
            chance.choice(["patch_size", "num_patches"]): chance.choice([1, 2, 3, 4, 5, 8, 16, 40]),
            "temperature": chance.choice([0.01, 0.05, 0.5, 10]),
            "contrast": chance.choice(["nt_xent", "sup_con"]),
            "ignore_index": self.ignore_index,
            "max_patches": chance.choice([None, None, None, 10**6, 2, 5]),
        }
        if name == "density":
            if options["max_patches"] is None:
                options["select"] = chance.choice(["all", "all", 2, 3, 50])
            return options | {"threshold": chance.choice([0, 0.25, 0.3, 0.5, 0.9])}
        radii = [chance.choice([1, 2, 3, 5, 30]) for _ in range(4)]
        threshold = chance.choice([None, 0.0, 0.3, 0.5])
        pairs = threshold is not None and chance.random() < 0.7
        return options | {
            "inner_radius": tuple(radii[:2]) if pairs else radii[0],
            "outer_radius": radii[2:] if pairs else radii[2],
            "footprint": chance.choice(["square", "cross"]),
            "isolate_patches": chance.random() < 0.5,
            "scope": chance.choice(["patch", "image"]),
            "density_threshold": threshold,
        }

    def criterion(self):
        """The loss of this call."""
        if self.kind in LOSSES:
            return LOSSES[self.kind](**self.options[self.kind])
        if self.kind == "hecl":
            return CombinedExudateLoss.hecl(ignore_index=self.ignore_index)
        parts = {name: LOSSES[name](**self.options[name]) for name in LOSSES}
        return CombinedExudateLoss(*self.weights, **parts, ignore_index=self.ignore_index)

    def arguments(self):
        """What to call it with, by name."""
        arguments = {"logits": self.logits, "target": self.target, "features": self.features}
        return {name: tensor for name, tensor in arguments.items() if name != "logits" or self.kind not in LOSSES}

    def wanted(self):
        """The loss by the slow reference in float64, and its gradient by the features; None where it is drawn."""
        features = self.features.detach().double().requires_grad_()
        target = self.target.double()
        if self.kind == "hecl" and self.ignore_index is not None and bool((target == self.ignore_index).any()):
            return None
        loss = features.sum() * 0
        if self.kind not in LOSSES:
            ignored = self.ignore_index if _holds(self.target.dtype, self.ignore_index) else None
            loss = loss + reference.cross_entropy(self.logits.detach().double(), target, ignored)
        if self.kind == "hecl":
            loss = loss + 0.01 * sum(published_loop(features, target))
            return loss.detach(), torch.autograd.grad(loss, features)[0]
        weights = {self.kind: 1} if self.kind in LOSSES else dict(zip(LOSSES, self.weights, strict=True))
        terms = {"density": reference.density_loss, "edge": reference.edge_loss}
        for name, weight in weights.items():
            options = dict(self.options[name])
            if weight and options.pop("max_patches") in (2, 5):
                return None
            options.pop("max_patches", None)
            options["contrast_kind"] = options.pop("contrast")
            if weight:
                loss = loss + weight * terms[name](features, target, **options)
        return loss.detach(), torch.autograd.grad(loss, features)[0]


def _holds(dtype, value):
    """Whether torch gives the value back."""
    try:
        return value is not None and int(torch.tensor(value, dtype=dtype).double()) == value
    except (OverflowError, RuntimeError, ValueError):
        return False


def valid_call(seed: int) -> None:
    """Raise unless the call of this seed keeps every promise."""
    call = Call(seed)
    arguments = call.arguments()
    before = {name: tensor.detach().clone() for name, tensor in arguments.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "edge has scope='image'|target has exactly one class")  # as drawn, it has
        loss = call.criterion()(**arguments)
        inputs = [tensor for tensor in arguments.values() if tensor.requires_grad]
        gradients = torch.autograd.grad(loss, inputs, allow_unused=call.kind == "combined")
    wide = torch.promote_types(call.dtype, torch.float32)
    assert type(loss) is torch.Tensor
    assert loss.shape == ()
    assert loss.dtype == wide or call.kind == "combined", loss.dtype
    assert loss.isfinite(), loss
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients), "gradient"
    for name, tensor in arguments.items():
        assert torch.equal(tensor.detach().double(), before[name].double()), f"{name} was changed"
    wanted = call.wanted()
    if wanted is None:
        return
    narrow = call.kind not in LOSSES and call.logits.dtype != torch.float64
    relative, _, absolute = TOLERANCE[torch.float32 if narrow else call.dtype]
    of_gradient = TOLERANCE[call.dtype][1]
    weight = max(1, *call.weights) if call.kind == "combined" else 1
    cold = max(1, 1 / min(options["temperature"] for options in call.options.values()))
    error = abs(loss.detach().double() - wanted[0])
    assert error <= relative * abs(wanted[0]) + absolute * cold * weight, (float(loss), float(wanted[0]))
    gradient = torch.zeros_like(call.features) if gradients[-1] is None else gradients[-1]
    error, norm = (gradient.double() - wanted[1]).norm(), wanted[1].norm()
    least = torch.finfo(call.dtype).smallest_normal * gradient.numel() ** 0.5
    floor = absolute * cold * weight / call.scale + least
    assert error <= of_gradient * norm + floor, (float(error), float(norm))


WRONG = {
    "patch_size": [0, -3, 1.5, "8", True, (4, 4), math.nan],
    "num_patches": [0, -1, 2.0, "8", False, [3]],
    "temperature": [0, -0.05, 1e-4, math.nan, math.inf, "0.05", None, True, 1j],
    "contrast": ["", "NT_XENT", "supcon", None, 3, ("nt_xent",)],
    "threshold": [1, 1.5, -0.1, math.nan, None, "0.5", True],
    "select": [0, 1, -2, "best", None, 3.0, True, (3,)],
    "max_patches": [0, 1, -5, 2.5, "3", True],
    "ignore_index": [0, 1, True, 255.0, "255", 2**63, -(2**63) - 1, math.nan],
    "gather_distributed": [0, 1, None, "yes"],
    "inner_radius": [0, -1, 1.5, "2", None, True, (0, 1), (1, 2, 3), (1,), (1, "2"), (1, 1.5), math.inf],
    "outer_radius": [0, -1, 2.5, "2", None, False, (3, 0), [], [2], (None, 1)],
    "footprint": ["disk", "", None, 4, torch.ones(3, 3)],
    "isolate_patches": [0, 1, None, "no"],
    "scope": ["batch", None, 1],
    "density_threshold": [1, 1.0, -0.01, math.nan, "0.3", True],
    "alpha": [-1, -1e-9, math.nan, math.inf, "0.1", None, True, torch.tensor(0.1), 1e39],
    "beta": [-0.5, math.nan, -math.inf, "0.1", None, False, [0.1]],
    "supervised": [3, "bce", torch.nn.BCELoss, torch.zeros(2)],
    "density": [3, "density", PatchEdgeContrastLoss(), PatchDensityContrastLoss],
    "edge": [0.1, PatchDensityContrastLoss(), torch.nn.MSELoss()],
    "features": [torch.zeros(1, 2, 4, 4), "decoder", torch.nn.Identity],
}
OF_BOTH = ("patch_size", "num_patches", "temperature", "contrast", "max_patches", "ignore_index", "gather_distributed")
OPTIONS = {
    PatchDensityContrastLoss: (*OF_BOTH, "threshold", "select"),
    PatchEdgeContrastLoss: (
        *OF_BOTH, "inner_radius", "outer_radius", "footprint", "isolate_patches", "scope", "density_threshold",
    ),
    CombinedExudateLoss: ("alpha", "beta", "supervised", "density", "edge", "ignore_index", "features"),
}  # fmt: skip


def _everything(tensor):
    """What is wrong for every tensor argument."""
    yield from (tensor[0], tensor[None], tensor[:, :, :0], tensor[:0], tensor.detach().tolist(), 3.0, "tensor")
    yield from (tensor.detach().float().to_sparse(), tensor.detach().to(torch.complex64), None)


def _wrong_tensors(call, name):
    tensor = call.arguments()[name].detach()
    yield from _everything(tensor)
    if name == "target":
        for value in (2, -1, 255, 0.5, math.nan, math.inf):
            if value != call.ignore_index:
                spoiled = tensor.double().contiguous()
                spoiled.view(-1)[call.chance.randrange(spoiled.numel())] = value
                yield spoiled
    else:
        yield from (tensor.to(torch.int32), tensor > 0, torch.cat([tensor, tensor]), tensor.to("meta"))
        yield from (tensor.to(torch.float8_e5m2), tensor.to(torch.float8_e4m3fn))
    if name == "features":
        yield tensor[:, :1]
    if name == "logits":
        yield from (torch.cat([tensor, tensor], 1), torch.cat([tensor, tensor], 2), tensor.repeat(1, 3, 2, 1))


def invalid_call(seed: int) -> None:
    """Raise unless what is wrong in the call of this seed is refused by name, by an error of ours."""
    call = Call(seed)
    chance = call.chance
    if chance.random() < 0.5:
        kind = chance.choice(list(OPTIONS))
        name = chance.choice(OPTIONS[kind])
        wrong = chance.choice(WRONG[name])

        def refused():
            kind(**{name: wrong})
    else:
        call.weights = chance.choice([(1.0, 1.0), (0.5, 0), (0, 2)])
        arguments = call.arguments()
        name = chance.choice(list(arguments))
        wrong = chance.choice(list(_wrong_tensors(call, name)))
        criterion = call.criterion()

        def refused():
            criterion(**arguments | {name: wrong})

    shown = (wrong.dtype, tuple(wrong.shape)) if isinstance(wrong, torch.Tensor) else wrong
    error = None
    try:
        refused()
    except (TypeError, ValueError) as caught:
        error = caught
    assert error is not None, f"{name} = {shown} passes"
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    assert last.startswith(PACKAGE), f"{name} = {shown} fails inside torch: {error}"
    assert re.search(rf"\b{name}\b", str(error)), f"{name} = {shown} is not named: {error}"


def failures(check, seeds) -> dict[int, str]:
    """The seeds that fail, with what they say."""
    found = {}
    for seed in seeds:
        try:
            check(seed)
        except Exception as error:
            found[seed] = f"{type(error).__name__}: {error}"
    return found


def main() -> None:
    """Read the command line, call, and print every failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--valid", type=int, default=100_000, help="number of valid calls")
    parser.add_argument("--invalid", type=int, default=10_000, help="number of invalid calls")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for check, count in ((valid_call, options.valid), (invalid_call, options.invalid)):
        seeds = tqdm(range(options.seed, options.seed + count), desc=check.__name__, mininterval=5)
        found = failures(check, seeds)
        for seed, text in itertools.islice(found.items(), 100):
            print(f"{check.__name__}({seed}): {text}")
        print(f"{check.__name__}: {len(found)} of {count} fail")


if __name__ == "__main__":
    main()
