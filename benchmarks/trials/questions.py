"""What the study asks: the arms of each question, and its seeds."""

import dataclasses
from typing import Any, NamedTuple

from trials.objective import Settings
from trials.pairs import PAIRS

BCE = Settings()
PAPER = dataclasses.replace(BCE, alpha=0.02, beta=0.1)


class Question(NamedTuple):
    """Runs that belong together.

    arms: settings by name; a name stands for the same settings in every question.
    seeds: that each arm gets.
    tested: whether the test images are looked at; choices are made without them.
    device: "cpu" or "cuda", on which all of its runs are done: only runs of one kind are compared.
    """

    arms: dict[str, Settings]
    seeds: range
    tested: bool
    device: str = "cpu"

    def baseline(self, arm: str) -> str | None:
        """Name of the arm to compare this one with, None if there is none.

        It has the same lesions, network, size and steps and none of the terms; of such arms the one that has the same
        supervised loss and ignores the same pixels, or else the same loss, or else BCE.
        """
        own = self.arms[arm]
        plain = Settings(own.lesions, own.network, own.size, own.crop, own.batch, own.steps, data=own.data)
        alike = _but(plain, supervised=own.supervised)
        wanted = (_but(alike, disc=own.disc), alike, _but(plain, disc=own.disc), plain)
        return next((name for one in wanted for name, other in self.arms.items() if other == one and name != arm), None)


def _but(settings: Settings, **changes: object) -> Settings:
    return dataclasses.replace(settings, **changes)  # type: ignore[arg-type]  # each name has a type of its own


def _short(arms: dict[str, Settings]) -> dict[str, Settings]:
    return {f"{name}, short": _but(settings, steps=450) for name, settings in arms.items()}


def _in_share(size: int) -> Settings:
    """The ramp at another size, its patches and bands as large a share of the photograph."""
    edge = {"patch_size": 16 * size // 712, "inner_radius": 2 * size // 712, "outer_radius": 2 * size // 712}
    return _but(RAMP, size=size, edge=edge)


FIRST = {
    "bce": BCE,
    "bce + density": _but(PAPER, beta=0.0),
    "bce + edge": _but(PAPER, alpha=0.0),
    "both": PAPER,
    "hecl": _but(BCE, alpha=0.01, beta=0.01, hecl=True),
}
# The paper's alpha, and its beta divided by 50: by proportion, each term pulls at the features about as hard as BCE.
SCALED = _but(PAPER, beta=0.002)
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
RAMP = FACTORS["edge, ramp"]
BOTH_RAMP = _but(SCALED, density={"threshold": 0.1}, weights="ramp")
PEERS = {
    "bce": BCE,
    **{name: _but(BCE, supervised=name) for name in ("dice + bce", "focal", "tversky", "hausdorff + bce")},
}
CONFIRMED = {
    "bce": BCE,
    "edge, ramp": RAMP,
    "both, edge / 50, threshold 0.1, ramp": BOTH_RAMP,
    "dice + bce": PEERS["dice + bce"],
    "dice + bce + edge, ramp": _but(RAMP, supervised="dice + bce"),
    "tversky": PEERS["tversky"],
    "tversky + edge, ramp": _but(RAMP, supervised="tversky"),
}
ON_PEERS = {
    f"{name} + both, edge / 50, threshold 0.1, ramp": _but(BOTH_RAMP, supervised=name)
    for name in ("dice + bce", "tversky")
}
# In k edge pulled a tenth as hard as Dice + BCE and an eighth as hard as Tversky, here about as hard as they do.
HARDER = {
    name: settings
    for loss in ("dice + bce", "tversky")
    for name, settings in (
        (loss, PEERS[loss]),
        (f"{loss} + edge / 5, ramp", _but(RAMP, supervised=loss, beta=0.02)),
    )
}
# The gate: t's first comparison again, on seeds of its own.
HARDER_ON_DICE = {name: settings for name, settings in HARDER.items() if settings.supervised == "dice + bce"}
LONGER = {f"{name}, long": _but(settings, steps=1800) for name, settings in HARDER_ON_DICE.items()}
PEERS_OF_PULL = {**HARDER, "bce": BCE, "edge, ramp": RAMP}
# As users call the constructor: that decides.
PULLED = {
    f"{loss} + edge, pull 1": _but(BCE, supervised=loss, beta=1.0, weights="pull")
    for loss in ("dice + bce", "tversky", "bce")
}
PULLED_OTHERWISE = {
    f"{loss} + edge, pull {times:g}, ramp": _but(BCE, supervised=loss, beta=times, weights="pull, ramp")
    for times in (1.0, 0.5, 2.0)
    for loss in ("dice + bce", "tversky", "bce")
} | {
    f"{loss} + edge, pull 2": _but(BCE, supervised=loss, beta=2.0, weights="pull")
    for loss in ("dice + bce", "tversky", "bce")
}
# Where a fixed weight fell short or was not tried.
ELSEWHERE: dict[str, dict[str, Any]] = {
    **{lesion: {"lesions": (lesion,)} for lesion in ("MA", "SE", "HE")},
    **{network: {"network": network} for network in ("fpn", "deeplabv3plus")},
}
PULLED_ELSEWHERE = {
    name: settings
    for where, changes in ELSEWHERE.items()
    for name, settings in (
        (f"dice + bce, {where}", _but(PEERS["dice + bce"], **changes)),
        (f"dice + bce + edge, pull 2, {where}", _but(PULLED_OTHERWISE["dice + bce + edge, pull 2"], **changes)),
    )
}
# Other losses for small lesions or for overlap, with the published weight and a smaller one.
OPPONENTS = {
    name: _but(BCE, supervised=name)
    for name in ("bce", "dice + bce", "cc-dice", "cc-dice, a fifth", "blob", "blob, a tenth", "lovasz", "lovasz + bce")
} | {"dice + bce + edge, pull 2": PULLED_OTHERWISE["dice + bce + edge, pull 2"]}
# By the rule of o the two that led in it.
LEADERS = {
    name: settings
    for loss in ("dice + bce", "cc-dice", "blob")
    for name, settings in (
        (loss, OPPONENTS[loss]),
        (f"{loss} + edge, pull 2", _but(PULLED_OTHERWISE["dice + bce + edge, pull 2"], supervised=loss)),
    )
}
# Other embeddings for the edge term, beside its own.
VARIED = {
    name: _but(PULLED_OTHERWISE["dice + bce + edge, pull 2"], edge=edge)
    for name, edge in (
        ("dice + bce + edge, pull 2", {}),
        ("dice + bce + edge by lesions, pull 2", {"variant": "lesions"}),
        ("dice + bce + edge and decoys, pull 2", {"variant": "decoys"}),
        ("dice + bce + edge of errors, pull 2", {"variant": "errors"}),
        ("dice + bce + edge on two levels, pull 2", {"variant": "levels", "deeper": "decoder.blocks.4"}),
        ("dice + bce + edge with a memory, pull 2", {"variant": "memory"}),
    )
}
TILES = {
    f"{name}, tiles": _but(settings, data="tiles", crop=96, batch=16)
    for name, settings in (
        ("dice + bce", PEERS["dice + bce"]),
        ("dice + bce + edge, pull 2", PULLED_OTHERWISE["dice + bce + edge, pull 2"]),
    )
}
DISC = {
    "bce": BCE,
    "both": PAPER,
    "edge, ramp": RAMP,
    "bce, disc ignored": _but(BCE, disc="ignored"),
    "both, disc ignored": _but(PAPER, disc="ignored"),
    "both, disc ignored by the terms": _but(PAPER, disc="ignored by the terms"),
    "edge, ramp, disc ignored by the terms": _but(RAMP, disc="ignored by the terms"),
}
NETWORKS = {
    f"{arm}, {network}": _but(settings, network=network)
    for network in ("fpn", "deeplabv3plus")
    for arm, settings in (*FIRST.items(), ("edge, ramp", RAMP))
}
RESOLUTION = {
    name: settings
    for size in (356, 1424)
    for name, settings in (
        (f"bce, {size}", _but(BCE, size=size)),
        (f"edge, ramp, {size}", _but(RAMP, size=size)),
        (f"edge, ramp, {size}, patch and bands in share", _in_share(size)),
    )
}
NATIVE = {"bce, 2848": _but(BCE, size=2848), "edge, ramp, 2848, patch and bands in share": _in_share(2848)}
OTHER = {
    f"{arm}, {'+'.join(lesions)}": _but(settings, lesions=lesions)
    for lesions in (("HE",), ("SE",), ("MA",), ("MA", "HE", "EX", "SE"))
    for arm, settings in (("bce", BCE), ("edge, ramp", RAMP))
}

QUESTIONS = {
    "a": Question(FIRST, range(5), tested=True),
    "b": Question(DISC, range(10, 13), tested=True, device="cuda"),
    "c": Question(PEERS | ON_PEERS, range(10, 13), tested=True, device="cuda"),
    "s": Question({**FIRST, **_short(FIRST)}, range(2), tested=False),
    "d": Question(_short({**FIRST, **FACTORS}), range(2), tested=False),
    "e": Question(FOUND, range(10), tested=True, device="cuda"),
    "k": Question(CONFIRMED, range(10, 20), tested=True, device="cuda"),
    "m": Question(_short(HARDER), range(3), tested=False),
    "t": Question(HARDER, range(20, 23), tested=True),
    "u": Question(HARDER_ON_DICE, range(23, 30), tested=True),
    "v": Question(LONGER, range(23, 26), tested=True),
    "p": Question(_short({**PEERS_OF_PULL, **PULLED}), range(3), tested=False),
    "q": Question(_short({**PEERS_OF_PULL, **PULLED_OTHERWISE}), range(3), tested=False),
    "r": Question(_short(PULLED_ELSEWHERE), range(3), tested=False),
    "o": Question(_short(OPPONENTS), range(3), tested=False),
    "y": Question(LEADERS, range(23, 30), tested=True),
    "w": Question(_short({"dice + bce": PEERS["dice + bce"], **VARIED}), range(3), tested=False),
    "x": Question(TILES, range(7), tested=True),
    "f": Question(NETWORKS, range(3), tested=True),
    "g": Question(RESOLUTION, range(2), tested=True, device="cuda"),
    "n": Question(NATIVE, range(1), tested=True, device="cuda"),
    "h": Question(OTHER, range(3), tested=True, device="cuda"),
}
