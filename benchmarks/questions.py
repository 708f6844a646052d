"""What the study asks: the arms of each question and how many seeds each gets."""

import dataclasses
from typing import NamedTuple

from objective import Settings
from pairs import PAIRS

BCE = Settings()
PAPER = dataclasses.replace(BCE, alpha=0.02, beta=0.1)


class Question(NamedTuple):
    """Runs that belong together.

    arms: settings by name; a name stands for the same settings in every question.
    seeds: how many each arm gets, from 0 on.
    tested: whether the test images are looked at; choices are made without them.
    device: "cpu" or "cuda", on which all of its runs are done: only runs of one kind are compared.
    """

    arms: dict[str, Settings]
    seeds: int
    tested: bool
    device: str = "cpu"

    def baseline(self, arm: str) -> str | None:
        """Name of the plain BCE arm to compare this one with, None if there is none.

        It has the same lesions, network, size and steps, and ignores the same pixels if another arm of plain BCE does.
        """
        own = self.arms[arm]
        plain = Settings(own.lesions, own.network, own.size, own.crop, own.batch, own.steps)
        wanted = (_but(plain, disc=own.disc), plain)
        return next((name for one in wanted for name, other in self.arms.items() if other == one and name != arm), None)


def _but(settings: Settings, **changes: object) -> Settings:
    return dataclasses.replace(settings, **changes)  # type: ignore[arg-type]  # each name has a type of its own


def _short(arms: dict[str, Settings]) -> dict[str, Settings]:
    return {f"{name}, short": _but(settings, steps=450) for name, settings in arms.items()}


FIRST = {
    "bce": BCE,
    "bce + density": _but(PAPER, beta=0.0),
    "bce + edge": _but(PAPER, alpha=0.0),
    "both": PAPER,
    "hecl": _but(BCE, alpha=0.01, beta=0.01, hecl=True),
}
# The paper's alpha, and its beta divided by 50: by proportion, each term pulls at the features about as hard as BCE.
SCALED = _but(PAPER, beta=0.002)
DISC = {
    "bce": BCE,
    "both, edge / 50": SCALED,
    "bce, disc ignored": _but(BCE, disc="ignored"),
    "both, edge / 50, disc ignored": _but(SCALED, disc="ignored"),
    "both, edge / 50, disc ignored by the terms": _but(SCALED, disc="ignored by the terms"),
}
PEERS = {
    "bce": BCE,
    **{name: _but(BCE, supervised=name) for name in ("dice + bce", "focal", "tversky", "hausdorff + bce")},
}
EDGE = _but(SCALED, alpha=0.0)
FACTORS = {
    "both, edge / 50": SCALED,
    "both, edge / 500": _but(SCALED, beta=0.0002),
    "edge / 50": EDGE,
    **{f"edge / {n}": _but(EDGE, beta=0.1 / n) for n in (15, 500)},
    "bce + density x 3": _but(BCE, alpha=0.06),
    "both, density x 3, edge / 50": _but(SCALED, alpha=0.06),
    "both / 3": _but(PAPER, alpha=0.02 / 3, beta=0.1 / 3),
    "both / 10": _but(PAPER, alpha=0.002, beta=0.01),
    "both / 100": _but(PAPER, alpha=0.0002, beta=0.001),
    "both x 3": _but(PAPER, alpha=0.06, beta=0.3),
    # What a difference without an effect looks like.
    "bce + density / 1000": _but(BCE, alpha=2e-5),
    **{f"hecl x {n}": _but(FIRST["hecl"], alpha=0.01 * n, beta=0.01 * n) for n in (3, 10)},
    **{
        f"{n} patches a label": _but(SCALED, density={"max_patches": n}, edge={"max_patches": n}) for n in (16, 64, 256)
    },
    # One factor at a time from edge alone, and of density what may be wrong with it.
    **{f"edge, temperature {t}": _but(EDGE, edge={"temperature": t}) for t in (0.1, 0.5)},
    **{f"edge, patch size {p}": _but(EDGE, edge={"patch_size": p}) for p in (8, 32, 64)},
    **{f"edge, radii {r}": _but(EDGE, edge={"inner_radius": r, "outer_radius": r}) for r in (1, 4)},
    "edge, sup_con": _but(EDGE, edge={"contrast": "sup_con"}),
    "edge, a band an image": _but(EDGE, edge={"scope": "image"}),
    "edge, features before the last block": _but(EDGE, layer="decoder.blocks.4"),
    "edge, projection": _but(EDGE, projection=True),
    "edge, ramp": _but(EDGE, weights="ramp"),
    **{f"edge, share {s}": _but(BCE, beta=s, weights="share") for s in (0.03, 0.1, 0.3)},
    **{f"threshold {t}": _but(SCALED, density={"threshold": t}) for t in (0.05, 0.1, 0.3)},
    "patch size 8": _but(SCALED, density={"patch_size": 8}),
    "density, sup_con": _but(SCALED, density={"contrast": "sup_con"}),
    **{f"{pairs} pairs": _but(SCALED, density={"pairs": pairs}) for pairs in PAIRS},
}
# The first by its lead in both seeds, the others by theirs in the one that they had.
FOUND = {"bce": BCE} | {arm: FACTORS[arm] for arm in ("edge / 50", "edge, ramp", "edge, patch size 8")}
NETWORKS = {
    f"{arm}, {network}": _but(FIRST[arm], network=network) for network in ("fpn", "deeplabv3plus") for arm in FIRST
}
RESOLUTION: dict[str, Settings] = {}
for size in (356, 1424):
    patch = {"patch_size": 16 * size // 712}
    RESOLUTION[f"bce, {size}"] = _but(BCE, size=size)
    RESOLUTION[f"both, edge / 50, {size}"] = _but(SCALED, size=size)
    bands = {"inner_radius": 2 * size // 712, "outer_radius": 2 * size // 712}
    RESOLUTION[f"both, edge / 50, {size}, patch and bands in share"] = _but(
        SCALED, size=size, density=patch, edge=patch | bands
    )
OTHER = {
    f"{arm}, {'+'.join(lesions)}": _but(settings, lesions=lesions)
    for lesions in (("HE",), ("SE",), ("MA",), ("MA", "HE", "EX", "SE"))
    for arm, settings in (("bce", BCE), ("both, edge / 50", SCALED))
}

QUESTIONS = {
    "a": Question(FIRST, 5, tested=True),
    "b": Question(DISC, 3, tested=True),
    "c": Question(PEERS, 3, tested=True, device="cuda"),
    "s": Question({**FIRST, **_short(FIRST)}, 2, tested=False),
    "d": Question(_short({**FIRST, **FACTORS}), 2, tested=False),
    "e": Question(FOUND, 10, tested=True, device="cuda"),
    "f": Question(NETWORKS, 3, tested=True),
    "g": Question(RESOLUTION, 2, tested=True),
    "h": Question(OTHER, 2, tested=True),
}
