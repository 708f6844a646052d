"""Every figure that README and the pages say of the study is that of its recorded runs."""

import json
import re
from pathlib import Path

import errors
import numpy as np
import pytest
import summary
from scipy import integrate, stats
from trials.differences import holm, of_each_seed, over_both, over_seeds, paired
from trials.questions import QUESTIONS
from trials.record import RESULTS, read_lines, runs_of

ROOT = Path(summary.__file__).parents[1]
LINES = read_lines(RESULTS)
ARMS = {letter: summary._arms(question, LINES) for letter, question in QUESTIONS.items()}
RAMPS = {"bce": "edge, ramp", "dice + bce": "dice + bce + edge, ramp", "tversky": "tversky + edge, ramp"}
HARDER = {loss: f"{loss} + edge / 5, ramp" for loss in ("dice + bce", "tversky")}
LETTERS = {"dice + bce": "t, u", "tversky": "t"}  # the questions that have runs of HARDER's arms
NAMES = {"bce": "BCE", "dice + bce": "Dice + BCE", "tversky": "Tversky"}
# The rows of the page's table: question, arm, its supervised loss, its edge term.
ROWS = [
    ("k", RAMPS["bce"], "bce", "0.002, rising"),
    ("e", "edge / 50", "bce", "0.002, fixed"),
    *(("k", RAMPS[loss], loss, "0.002, rising") for loss in HARDER),
    *((LETTERS[loss], HARDER[loss], loss, "0.02, rising") for loss in HARDER),
]
FIGURE = re.compile(r"(?<!\d)\d\.\d{3,}")


def pairs(letters, arm):
    """Runs of one or several questions and what they are compared with; of e without the seeds that chose its arms."""
    found = [pair for one in letters.split(", ") for pair in summary._pairs(QUESTIONS[one], ARMS[one])[arm]]
    return found[2:] if letters == "e" else found


def mean(letter, arm, metric):
    return np.mean(of_each_seed(pairs(letter, arm), metric))


def seeds(letter, arm, metric, places=3):
    middle, interval, _ = over_seeds(of_each_seed(pairs(letter, arm), metric))
    return "{:+.{p}f} ({:+.{p}f} to {:+.{p}f})".format(middle, *interval, p=places)


def both(letter, arm, metric):
    interval = over_both(pairs(letter, arm), metric.removesuffix("_tuned"), tuned=metric.endswith("_tuned")).interval
    return "{:+.3f} to {:+.3f}".format(*interval)


def full(letter, arm, metric):
    return f"{seeds(letter, arm, metric)} [{both(letter, arm, metric)}]"


def total(runs, name):
    """A count at the best threshold over all photographs of these runs."""
    return sum(photograph[name] for run in runs for photograph in run["test"]["tuned"]["photographs"])


def recall(runs):
    return total(runs, "tp") / (total(runs, "tp") + total(runs, "fn"))


def precision_of(letter, arm):
    """Change in false positive pixels, in percent, and in the recall of pixels."""
    ours, theirs = zip(*pairs(letter, arm), strict=True)
    return f"{100 * (total(ours, 'fp') / total(theirs, 'fp') - 1):+.0f} %", f"{recall(ours) - recall(theirs):+.3f}"


def average_precision(letter, arm):
    """Average precision on the test photographs, the mean over seeds."""
    return np.mean([run["test"]["average_precision"] for run in ARMS[letter][arm]])


def baseline(letter, arm):
    return f"{np.mean([other['test']['f1_tuned'] for _, other in pairs(letter, arm)]):.3f}"


def adjusted(letter, arm):
    """Holm's p over seeds [over seeds and photographs]."""
    question = QUESTIONS[letter]
    return summary._holm(question, summary._pairs(question, ARMS[letter]), "f1_tuned")[arm]


def share_of_lesions_found():
    """In percent, by Dice + BCE with the edge term and without it, the mean over u's seeds."""
    found = [[run["test"]["lesion_recall_tuned"] for run in pair] for pair in pairs("u", HARDER["dice + bce"])]
    return 100 * np.mean(found, 0)


def own_runs(letter):
    """How many runs of a question's arms that no other question has."""
    others = {arm for one, question in QUESTIONS.items() if one != letter for arm in question.arms}
    return sum(len(runs) for arm, runs in ARMS[letter].items() if arm not in others)


def of_both_losses():
    """Holm's p of HARDER's arms, over seeds [over seeds and photographs]."""
    found = [pairs(LETTERS[loss], arm) for loss, arm in HARDER.items()]
    over = holm([over_seeds(of_each_seed(own, "f1_tuned")).p for own in found])
    crossed = holm([over_both(own, "f1", tuned=True).p for own in found])
    return [f"{p:.3f} [{q:.3f}]" for p, q in zip(over, crossed, strict=True)]


def by_photograph(letter, arm):
    """(pairs, photographs): differences in F1 at the best threshold."""
    counted = [[run["test"]["tuned"]["photographs"] for run in pair] for pair in pairs(letter, arm)]
    f1 = [[[2 * p["tp"] / (2 * p["tp"] + p["fp"] + p["fn"]) for p in run] for run in pair] for pair in counted]
    return np.subtract(*np.moveaxis(np.array(f1), 1, 0))


def small_found(letter, arm):
    """Photographs in which more small lesions are found, and in which fewer."""
    found = [
        np.sum([[p["small_found"] for p in run["test"]["tuned"]["photographs"]] for run in runs], 0)
        for runs in zip(*pairs(letter, arm), strict=True)
    ]
    return (found[0] > found[1]).sum(), (found[0] < found[1]).sum()


def needed(letter, arm):
    """Seeds for a power of 80 % to see a difference of 0.01, if seeds vary as they did."""
    deviation = np.std(of_each_seed(pairs(letter, arm), "f1_tuned"), ddof=1)

    def power(n):
        limit, shift = stats.t.ppf(0.975, n - 1), 0.01 / deviation * n**0.5
        return stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)

    return next(n for n in range(2, 99) if power(n) >= 0.8)


def folds(letter, arm, metric="f1_tuned"):
    return of_each_seed(pairs(letter, arm), metric, tested=False)


def on_fold(letter, arm, metric="f1_tuned"):
    return np.mean(folds(letter, arm, metric))


def holds(page, shown):
    missing = [words for words in shown if words not in page]
    assert missing == []


def test_the_table_of_the_page_is_that_of_the_runs():
    page = (ROOT / "docs/results.md").read_text()
    for letter, arm, loss, term in ROWS:
        ours, other = zip(*pairs(letter, arm), strict=True)
        assert {run["settings"]["supervised"] for run in (*ours, *other)} == {loss}
        assert {run["settings"]["beta"] for run in ours} == {float(term.split(",")[0])}
        f1 = [f"{np.mean([run['test']['f1_tuned'] for run in runs]):.3f}" for runs in (other, ours)]
        cells = [NAMES[loss], f"{term} ({letter})", str(len(ours)), *f1, full(letter, arm, "f1_tuned")]
        cells += [*precision_of(letter, arm), full(letter, arm, "small_recall_tuned")]
        assert f"| {' | '.join(cells)} |" in page


# Where the default was tried too: lesion, network, and its name in question r; the first row is of question q.
PLACES = [
    ("hard exudates", "U-Net", None),
    ("hard exudates", "FPN", "fpn"),
    ("hard exudates", "DeepLabV3+", "deeplabv3plus"),
    ("microaneurysms", "U-Net", "MA"),
    ("haemorrhages", "U-Net", "HE"),
    ("soft exudates", "U-Net", "SE"),
]


def carried(place):
    """Of the default on Dice + BCE in a place: the pairs of short runs."""
    where = f", {place}" if place else ""
    found = pairs("r" if place else "q", f"dice + bce + edge, pull 2{where}, short")
    assert len(found) == 3
    return found


def test_the_page_says_where_the_default_carries_over():
    page = (ROOT / "docs/evidence.md").read_text()
    gained = {}
    for lesion, network, place in PLACES:
        found = carried(place)
        f1, area, small = (
            of_each_seed(found, metric, tested=False) for metric in ("f1_tuned", "average_precision", "small_recall")
        )
        gained[place] = f1
        middle, interval, _ = over_seeds(f1)
        cells = [
            lesion,
            network,
            f"{np.mean([other['curve'][-1]['f1_tuned'] for _, other in found]):.3f}",
            "{:+.3f} ({:+.3f} to {:+.3f})".format(middle, *interval),
            ", ".join(f"{one:+.3f}" for one in f1),
            f"{np.mean(area):+.3f}",
            "-" if place == "SE" else f"{np.mean(small):+.3f}",
        ]
        holds(page, [f"| {' | '.join(cells)} |"])
        if place in (None, "fpn", "deeplabv3plus"):
            assert min(f1) > 0
    assert max(gained["SE"]) < 0
    of_soft = [run["curve"][-1]["small_recall"] for pair in carried("SE") for run in pair]
    assert set(of_soft) == {0}  # none is small


# What question o compares: rows of the page, and names of arms.
LOSSES = {
    "BCE": "bce",
    "CC-DiceCE, weight 1/2": "cc-dice",
    "CC-DiceCE, weight 1/5": "cc-dice, a fifth",
    "blob loss, weight 1/3": "blob",
    "blob loss, weight 1/10": "blob, a tenth",
    "Lovász": "lovasz",
    "Lovász + BCE": "lovasz + bce",
    "Dice + BCE with the default edge term": "dice + bce + edge, pull 2",
}


def test_the_page_compares_other_losses_as_the_runs_did():
    page = (ROOT / "docs/evidence.md").read_text()
    arms = {name: ARMS["o"][f"{name}, short"] for name in ("dice + bce", *LOSSES.values())}
    assert all([run["seed"] for run in runs] == [0, 1, 2] for runs in arms.values())
    f1 = {name: np.array([run["curve"][-1]["f1_tuned"] for run in runs]) for name, runs in arms.items()}
    plain = arms["dice + bce"]
    holds(page, [f"| Dice + BCE | {f1['dice + bce'].mean():.3f} |"])
    for row, name in LOSSES.items():
        each = f1[name] - f1["dice + bce"]
        others = [
            np.mean(of_each_seed(paired(arms[name], plain), metric, tested=False))
            for metric in ("average_precision", "small_recall")
        ]
        cells = [row, f"{f1[name].mean():.3f}", f"{each.mean():+.3f} ({', '.join(f'{one:+.3f}' for one in each)})"]
        holds(page, [f"| {' | '.join(cells + [f'{one:+.3f}' for one in others])} |"])
        assert (min(each) > 0) == (name not in ("bce", "lovasz", "lovasz + bce"))
    # The rule of o: of each loss the better variant, of these the first two go on.
    variants = ("cc-dice", "cc-dice, a fifth"), ("blob", "blob, a tenth"), ("lovasz", "lovasz + bce")
    best = [max(own, key=lambda name: f1[name].mean()) for own in variants]
    assert sorted(best, key=lambda name: -f1[name].mean())[:2] == ["cc-dice", "blob"]
    assert f1["cc-dice"].mean() > f1["dice + bce + edge, pull 2"].mean() > f1["cc-dice, a fifth"].mean()


def of_hei_med():
    """Networks of u on another data set: those with the edge term beside those without it."""
    lines = read_lines(ROOT / "benchmarks/results/hei-med.jsonl")
    plain, ours = ([line for line in lines if line["arm"] == arm] for arm in ("dice + bce", HARDER["dice + bce"]))
    found = paired(ours, plain)
    assert [run["seed"] for run, _ in found] == [25, 26, 27, 28, 29]
    return found


def test_the_page_says_how_the_networks_fare_on_hei_med():
    page, found = (ROOT / "docs/evidence.md").read_text(), of_hei_med()
    photographs = found[0][0]["test"]["photographs"]
    assert [len(photographs), sum(one["lesions"] > 0 for one in photographs)] == [169, 54]
    for row, metric, tuned in (
        ("F1 at the fold's threshold", "f1", True),
        ("F1 at 0.5", "f1", False),
        ("average precision", "average_precision", False),
        ("F1 over all pixels, fold's threshold", "f1_pixels", True),
    ):
        tests = [[run["test"]["tuned"] if tuned else run["test"] for run in pair] for pair in found]
        ours, plain = np.transpose([[test[metric] for test in pair] for pair in tests])
        each = ours - plain
        middle, interval, _ = over_seeds(each)
        cells = [row, f"{np.mean(plain):.3f}", f"{np.mean(ours):.3f}"]
        difference = "{:+.3f} ({:+.3f} to {:+.3f})".format(middle, *interval)
        if metric != "average_precision":
            difference += " [{:+.3f} to {:+.3f}]".format(*over_both(found, metric, tuned=tuned).interval)
        holds(page, [f"| {' | '.join([*cells, difference, ', '.join(f'{one:+.3f}' for one in each)])} |"])
        assert sum(each > 0) == (4 if metric == "f1" else 5)
        assert interval[0] < 0
        assert each[0] > 2 * max(each[1:])
    ours, plain = (total([run], "fp") for run in found[0])
    holds(page, [f"by {100 * (1 - ours / plain):.0f} % fewer false positive pixels"])


# What question w tries: rows of the page, and part of an arm's name.
VARIANTS = {
    "one of each kind a lesion": "by lesions",
    "64 decoys more": "and decoys",
    "pixels weighted by the network's error": "of errors",
}


def test_no_other_embeddings_meet_the_rule():
    page = (ROOT / "docs/evidence.md").read_text()
    plain = {run["seed"]: run for run in ARMS["w"]["dice + bce + edge, pull 2, short"]}
    for row, name in VARIANTS.items():
        runs = ARMS["w"][f"dice + bce + edge {name}, pull 2, short"]
        assert [run["seed"] for run in runs] == [0, 1, 2]
        f1 = [run["curve"][-1]["f1_tuned"] - plain[run["seed"]]["curve"][-1]["f1_tuned"] for run in runs]
        lesions = [run["fold"]["lesion_f1"] - plain[run["seed"]]["fold"]["lesion_f1"] for run in runs]
        for found, least in ((f1, 0.005), (lesions, 0.02)):
            assert np.mean(found) < least or min(found) < 0
        shown = (f"{np.mean(found):+.3f} ({', '.join(f'{one:+.3f}' for one in found)})" for found in (f1, lesions))
        holds(page, [f"| {row} | {' | '.join(shown)} |"])


def test_the_page_counts_lesions_as_the_runs_did():
    page = (ROOT / "docs/evidence.md").read_text()
    found = pairs("u", HARDER["dice + bce"])
    metrics = [f"{name}_tuned" for name in summary.LESIONS]
    for p in (
        holm([over_seeds(of_each_seed(found, name)).p for name in metrics]),
        holm([over_both(found, name.removesuffix("_tuned"), tuned=True).p for name in metrics]),
    ):
        small = {name for name, one in zip(summary.LESIONS, p, strict=True) if one < 0.001}
        assert small == {"lesion_recall", "small_lesion_recall"}
        assert sum(one < 0.05 for one in p) == 2
    for row, name in (
        ("lesions, recall", "lesion_recall"),
        ("predicted lesions, precision", "lesion_precision"),
        ("F1 of these", "lesion_f1"),
        ("lesions under 25 pixels, recall", "small_lesion_recall"),
        ("predicted ones under 25 pixels, precision", "small_lesion_precision"),
        ("F1 of these, small", "small_lesion_f1"),
    ):
        ours, other = (
            f"{np.mean([run['test'][f'{name}_tuned'] for run in runs]):.3f}" for runs in zip(*found, strict=True)
        )
        holds(page, [f"| {row} | {other} | {ours} | {full('u', HARDER['dice + bce'], f'{name}_tuned')} |"])


def of_the_pages():
    """What results.md and evidence.md say in words, figures as the runs have them."""
    gate = pairs("u", HARDER["dice + bce"])
    gained = of_each_seed(gate, "f1_tuned")
    assert over_seeds(gained).interval[0] < 0.003  # or the claim of t would stand
    assert all(min(of_each_seed(gate, f"{small}lesion_recall_tuned")) > 0 for small in ("", "small_"))
    assert min(of_each_seed(pairs("t, u", HARDER["dice + bce"]), "f1")) > 0
    losses = ("dice + bce", "tversky")
    by_hand = [on_fold("p", f"{loss} + edge / 5, ramp, short") for loss in losses]
    default, first, rising, first_rising = (
        [folds(letter, f"{loss} + edge, {pull}, short") for loss in losses] for letter, pull in PULLS
    )
    on_bce = folds("q", "bce + edge, pull 2, short")
    rising_on_bce = [folds("q", f"bce + edge, {pull}, ramp, short") for pull in ("pull 2", "pull 1")]
    assert np.greater(rising_on_bce, 0).all()
    halved = [folds("q", f"{loss} + edge, pull 0.5, ramp, short") for loss in (*losses, "bce")]
    assert [len(own) for own in halved] == [3, 3, 3]
    assert (np.mean(halved[:2], 1) < np.mean(first_rising, 1)).all()
    assert (np.mean(halved[:2], 1) < np.mean(rising, 1)).all()
    assert (np.mean(default, 1) > by_hand).all()  # README says so
    assert np.mean(on_bce) < on_fold("q", "edge, ramp, short")  # likewise
    assert np.min([*default, on_bce]) > 0
    assert (np.mean(default, 1) > np.array(by_hand) - 0.003).all()
    assert (np.mean(default, 1) > np.mean(first, 1)).all()
    assert (np.mean(first, 1) < np.array(by_hand) - 0.003).any()
    areas = [
        [folds(letter, f"{loss} + edge, {pull}, short", "average_precision") for loss in losses]
        for letter, pull in PULLS
    ]
    assert np.greater(areas[3], areas[1]).all()
    weak = np.mean([of_each_seed(pairs("k", RAMPS[loss]), "f1_tuned") for loss in HARDER], 0)
    averaged = over_seeds(weak.tolist())
    single = np.std(of_each_seed(pairs("k", RAMPS["bce"]), "f1_tuned"), ddof=1)
    short = {arm: of_each_seed(own, "f1_tuned", tested=False) for arm, own in all_short().items()}
    short = {arm: found for arm, found in short.items() if found}
    best = integrate.quad(lambda x: x * len(short) * stats.norm.pdf(x) * stats.norm.cdf(x) ** (len(short) - 1), -9, 9)
    (density,) = {f"{mean('a', 'bce + density', 'f1_tuned'):+.3f}"}
    with_density = "both, edge / 50, threshold 0.1, ramp"
    peers = {loss: by_photograph("k", loss) for loss in HARDER}
    spread = [[np.std(d.mean(axis), ddof=1) for d in peers.values()] for axis in (0, 1)]
    fewer = {
        loss: " %, ".join(
            f"{100 * (total([ours], 'fp') / total([other], 'fp') - 1):+.0f}"
            for ours, other in pairs(LETTERS[loss], arm)
        )
        for loss, arm in HARDER.items()
    }
    signs = [[d > 0 for d in of_each_seed(pairs(LETTERS[loss], arm), "f1_tuned")] for loss, arm in HARDER.items()]
    assert [sum(own) for own in signs] == [9, 3]
    assert sum(d > 0 for d in gained) == 6
    assert [own_runs(letter) for letter in "rwvxoy"] == [30, 9, 0, 0, 18, 6]  # what was not run
    halfway = [np.mean(at_step(450, *zip(*pairs(LETTERS[loss], arm), strict=True))) for loss, arm in HARDER.items()]
    assert (np.array(halfway) <= [on_fold(LETTERS[loss], arm) for loss, arm in HARDER.items()]).all()
    return [
        "added {:.3f} of F1 to Dice + BCE (ten seeds) and {:.3f} to Tversky (three)".format(
            *(mean(LETTERS[loss], arm, "f1_tuned") for loss, arm in HARDER.items())
        ),
        "{} and {} fewer false positive pixels".format(
            *(precision_of(LETTERS[loss], arm)[0].removeprefix("-") for loss, arm in HARDER.items())
        ),
        "pixel recall changed by {} and {}".format(
            *(precision_of(LETTERS[loss], arm)[1] for loss, arm in HARDER.items())
        ),
        "found {:.0f} % of the lesions with the term and {:.0f} % without it".format(*share_of_lesions_found()),
        "{:.0f} % more predicted lesions, {:.0f} % more lesions that one of them touches and {:.0f} % more".format(
            *(100 * (np.divide(*(total(runs, name) for runs in zip(*gate, strict=True))) - 1) for name in OBJECTS)
        ),
        f"gained {full('u', HARDER['dice + bce'], 'f1_tuned')}, six of the seven",
        f"Average precision changed by {seeds('u', HARDER['dice + bce'], 'average_precision')}",
        f"At probability 0.5 all ten seeds gained {full('t, u', HARDER['dice + bce'], 'f1')}",
        "p is {} for Dice + BCE and {} for Tversky".format(*of_both_losses()),
        "{} % on Dice + BCE, {} % on Tversky".format(
            *(", ".join(words.split(", ")[:-1]) + " and " + words.split(", ")[-1] for words in fewer.values())
        ),
        "(p {} and {})".format(*(adjusted("k", RAMPS[loss]) for loss in HARDER)),
        "{:+.4f} ({:+.4f} to {:+.4f}) [{}], above zero in {} of {} seeds".format(
            averaged.mean, *averaged.interval, over_both_losses(), (weak > 0).sum(), len(weak)
        ),
        f"Dice + BCE gains {full('k', 'dice + bce', 'f1_tuned')} over BCE, Tversky {full('k', 'tversky', 'f1_tuned')}",
        "(standard deviation {:.3f} and {:.3f}) than seeds do ({:.3f} and {:.3f})".format(*spread[0], *spread[1]),
        "p is {} and {}".format(*(adjusted("k", loss) for loss in HARDER)),
        f"lowers average precision by {-mean('k', 'tversky', 'average_precision'):.3f}",
        "more are found in {} (k) and {} (e) of 27 photographs, fewer in none".format(
            *(small_found(q, a)[0] for q, a, *_ in ROWS[:2])
        ),
        "gradient was {:.2f} (Dice + BCE) and {:.2f} (Tversky)".format(*map(float, pulls().values())),
        "450 steps gave {:+.3f} and {:+.3f}, runs of 900 steps, from other seeds, {:+.3f} and {:+.3f}".format(
            *(on_fold("m", f"{arm}, short") for arm in HARDER.values()),
            *(on_fold(LETTERS[loss], arm) for loss, arm in HARDER.items()),
        ),
        "had gained {:+.3f} and {:+.3f} after 450 of their steps".format(*halfway),
        f"lead of the short runs, {max(map(np.mean, short.values())):+.3f} with affinity pairs, is one run, "
        f"the best of {len(short)} arms",
        f"expected at {best[0] * single:.3f}",
        "{} of the {} test runs on Dice + BCE and Tversky chose the first or last of 19".format(*at_an_end()),
        f"{density} alone at the paper's weight ({len(of_each_seed(pairs('a', 'bce + density'), 'f1_tuned'))}".replace(
            "(4", "(four"
        ),
        f"{mean('k', with_density, 'f1_tuned'):+.3f} with threshold 0.1",
        f"average precision lower by {-mean('k', with_density, 'average_precision'):.3f}",
        f"both terms together change F1 by {full('a', 'both', 'f1')} (five seeds)",
        f"`hecl()` shows no effect: {full('a', 'hecl', 'f1')}",
        "patches of 8 to 64 pixels are within 0.004",
        "{:+.3f}, {:+.3f} and {:+.3f} (three seeds each)".format(
            *(mean("h", f"edge, ramp, {lesion}", "f1_tuned") for lesion in ("HE", "SE", "MA"))
        ),
        f"{mean('g', 'edge, ramp, 356', 'f1_tuned'):+.3f} at short side 356, "
        f"{mean('n', 'edge, ramp, 2848, patch and bands in share', 'f1_tuned'):+.3f} at the native",
        "It gains {:+.3f} of F1 over Dice + BCE ({:+.3f}, {:+.3f}, {:+.3f})".format(np.mean(default[0]), *default[0]),
        "and {:+.3f} over Tversky ({:+.3f}, {:+.3f}, {:+.3f})".format(np.mean(default[1]), *default[1]),
        "rises over the first third, gains {:+.3f} and {:+.3f}".format(*by_hand),
        "on BCE** gains {:+.3f} ({:+.3f}, {:+.3f}, {:+.3f}) in such runs".format(np.mean(on_bce), *on_bce),
        "in average precision {:+.3f}; the weight set by hand, 0.002, rising, gains {:+.3f} and {:+.3f}".format(
            on_fold("q", "bce + edge, pull 2, short", "average_precision"),
            on_fold("q", "edge, ramp, short"),
            on_fold("q", "edge, ramp, short", "average_precision"),
        ),
        "With a warm-up the default gains {:+.3f} and `Pull(1.0)` {:+.3f}, each in all three".format(
            *np.mean(rising_on_bce, 1)
        ),
        "`Pull(1.0)`, the first candidate, gains {:+.3f} and {:+.3f}".format(*np.mean(first, 1)),
        "helps `Pull(1.0)` ({:+.3f} and {:+.3f}, average precision higher in all six pairs)".format(
            *np.mean(first_rising, 1)
        ),
        "`Pull(0.5)` gains {:+.3f} over Dice + BCE, {:+.3f} over Tversky and {:+.3f} over BCE".format(
            *np.mean(halved, 1)
        ),
        "with it `Pull(2.0)` gains {:+.3f} and {:+.3f}, in average precision ".format(*np.mean(rising, 1))
        + "{:+.3f} and {:+.3f} instead of {:+.3f} and {:+.3f}".format(*np.mean(areas[2], 1), *np.mean(areas[0], 1)),
        CHALLENGE,
        "and have {:.3f} (BCE), {:.3f} (Dice + BCE) and {:.3f} (Tversky), which the edge term at beta ".format(
            *(average_precision("k", loss) for loss in ("bce", *HARDER))
        )
        + f"0.002 changes by at most {max(abs(mean('k', arm, 'average_precision')) for arm in RAMPS.values()):.3f} (k)",
        f"at the native size BCE had {average_precision('n', 'bce, 2848'):.3f}",
        f"FPN {mean('f', 'edge, ramp, fpn', 'f1_tuned'):+.3f}, "
        f"DeepLabV3+ {mean('f', 'edge, ramp, deeplabv3plus', 'f1_tuned'):+.3f}",
        "the default changes F1 by {:+.3f}, {:+.3f} and {:+.3f}".format(
            *(np.mean(of_each_seed(carried(lesion), "f1_tuned", tested=False)) for lesion in ("HE", "SE", "MA"))
        ),
        "the default gains {:+.3f} and {:+.3f}, in each of three seeds".format(
            *(np.mean(of_each_seed(carried(one), "f1_tuned", tested=False)) for one in ("fpn", "deeplabv3plus"))
        ),
    ]


def pulls():
    """Of the edge term at beta 0.02 beside the supervised loss's, ratio of the means."""
    return {loss: summary._pull(ARMS["t"][arm], "features", "edge").split("; ")[1] for loss, arm in HARDER.items()}


def at_step(step, ours, theirs):
    """Differences in F1 on the folds after so many steps, each at the best of the first thresholds."""
    points = [
        [next(point for point in run["curve"] if point["step"] == step) for run in runs] for runs in (ours, theirs)
    ]
    best = [[np.max(one.get("f1_by_first_threshold", one["f1_by_threshold"])) for one in own] for own in points]
    return np.subtract(*best)


def all_short():
    """Question d's arms with what they are compared with."""
    return summary._pairs(QUESTIONS["d"], ARMS["d"])


def over_both_losses():
    """The two-way interval of the ramp's mean effect on both losses, from the photographs' own differences."""
    from trials.differences import _student, _two_way

    table = np.mean([by_photograph("k", RAMPS[loss]) for loss in HARDER], 0)
    return "{:+.4f} to {:+.4f}".format(*_student(float(table.mean()), *_two_way(table)).interval)


def at_an_end():
    """Runs with a look at the test photographs that chose the first or last of the thresholds, and all of these."""
    runs = [run for run in LINES if run["tested"] and run["settings"]["supervised"] in HARDER]
    runs = [run for run in runs if np.size(run["curve"][-1]["f1_by_threshold"]) == 19]
    best = [np.argmax(run["curve"][-1]["f1_by_threshold"]) for run in runs]
    return sum(place in (0, 18) for place in best), len(runs)


# The default, the first candidate for it, and both with a warm-up: question and arm.
PULLS = ("q", "pull 2"), ("p", "pull 1"), ("q", "pull 2, ramp"), ("q", "pull 1, ramp")
# The average precision of the challenge's best network on hard exudates, table of Porwal et al. 2020.
CHALLENGE = "reached 0.885 in the IDRiD challenge"
OBJECTS = "predicted_lesions", "lesions_touched", "lesions_overlapped"
# Limits that tests here hold.
LIMITS = "asked for a lower end above 0.003", "both p are below 0.001"
# Said to be trials without a line.
TRIALS = "(F1 -0.009 and +0.015)", "two seeds gave +0.007 and -0.002"


def test_the_pages_say_what_the_runs_say_and_no_other_figure():
    pages = "\n".join((ROOT / "docs" / name).read_text() for name in ("results.md", "evidence.md"))
    shown = of_the_pages()
    holds(pages, shown)
    assert [small_found(q, a)[1] for q, a, *_ in ROWS[:2]] == [0, 0]
    sizes = [f"edge, patch size {p}, short" for p in (8, 32, 64)] + ["edge / 50, short"]
    leads = [np.mean(of_each_seed(all_short()[arm], "f1_tuned", tested=False)) for arm in sizes]
    assert max(leads) - min(leads) <= 0.0045
    words = "\n".join(line for line in pages.splitlines() if not line.startswith("| "))
    for known in (*shown, *LIMITS, *TRIALS):
        words = words.replace(known, "")
    assert set(FIGURE.findall(words)) == {"0.002"}  # the weight of the edge term


def test_the_plot_shows_how_hard_the_term_pulls_and_how_long_it_helps():
    doses, courses = summary._doses(ARMS), summary._courses(ARMS)
    assert list(doses) == list(NAMES)
    assert doses["dice + bce"]["dice + bce + edge, pull 2, short"] == (
        2,
        folds("q", "dice + bce + edge, pull 2, short"),
    )
    assert doses["bce"]["edge / 15, short"][1] == folds("d", "edge / 15, short")
    assert 4 < doses["bce"]["edge / 15, short"][0] < 4.5
    assert 70 < doses["bce"]["bce + edge, short"][0] < 75
    assert not any("share" in arm or "density" in arm for arms in doses.values() for arm in arms)
    for loss, arms in doses.items():  # the page says so
        means = [(pull, np.mean(differences)) for pull, differences in arms.values()]
        assert max(mean for pull, mean in means if pull < 0.6) < min(mean for pull, mean in means if 0.6 < pull < 5)
        assert round(max(pull for pull, _ in means)) == (72 if loss == "bce" else 2)
    assert list(courses) == list(HARDER)
    for loss, course in courses.items():
        assert list(course) == [150, 300, 450, 600, 750, 900]
        for step, differences in course.items():
            assert np.allclose(differences, at_step(step, *zip(*pairs(LETTERS[loss], HARDER[loss]), strict=True)))


# What the tables call the arms of train.py, and the rows; the loss's share is in percent.
SYNTHETIC = {
    "F1": ("f1", 1, ".3f"),
    "IoU": ("iou", 1, ".3f"),
    "average precision": ("average_precision", 1, ".3f"),
    "small-lesion recall": ("small_recall", 1, ".3f"),
    "the loss's share of a step, %": ("loss_share", 100, ".1f"),
}


def synthetic():
    """Of train.py's recorded runs each row's values, (arms, seeds)."""
    runs = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("train-cpu-*.json"))]
    assert [run["configuration"]["seed"] for run in runs] == list(range(len(runs)))
    same = [{**run["configuration"], "seed": 0, "output": "", "json": ""} for run in runs]
    assert same == same[:1] * len(runs)
    assert all(list(run["arms"]) == ["BCE", "Dice + BCE", "Dice + BCE + contrast"] for run in runs)
    assert all(run["configuration"][name] is None for run in runs for name in ("data", "alpha", "beta"))
    return {
        row: np.array([[times * run["arms"][arm][name] for run in runs] for arm in runs[0]["arms"]])
        for row, (name, times, _) in SYNTHETIC.items()
    }


def change(row, values):
    """What the edge term adds: the mean, and each seed's."""
    figure = "+" + SYNTHETIC[row][2]
    each = values[row][2] - values[row][1]
    return f"{each.mean():{figure}}" + (
        f" ({', '.join(f'{one:{figure}}' for one in each)})" if len(each) > 1 else " (one seed)"
    )


def synthetic_sentences():
    """What README says under its picture."""
    values = synthetic()
    f1 = [f"{own:.3f}" for own in values["F1"].mean(1)]
    small = [f"{100 * own:.0f} %" for own in values["small-lesion recall"].mean(1)]
    return [
        "F1 is {} with BCE, {} with Dice + BCE and {} with the edge term added".format(*f1),
        "{}, {} and {} of the lesions under 25 pixels are found".format(*small),
        f"The edge term changes F1 by {change('F1', values)}",
        f"and small-lesion recall by {change('small-lesion recall', values)}",
    ]


def test_the_table_of_the_synthetic_images_is_that_of_the_runs():
    page = (ROOT / "docs/results-tables.md").read_text()
    values, shown = synthetic(), []
    for row, (_, _, figure) in SYNTHETIC.items():
        cells = [
            f"{own.mean():{figure}}" + (f" ± {np.std(own, ddof=1):{figure}}" if len(own) > 1 else "")
            for own in values[row]
        ]
        shown.append(f"| {row} | {' | '.join(cells)} | {change(row, values)} |")
    holds(page, shown)


def test_readme_says_what_the_runs_say_and_no_other_figure():
    readme = (ROOT / "README.md").read_text()
    shown = []
    for letter, arm, loss, term in (ROWS[0], *ROWS[-2:]):
        row = [NAMES[loss], term.split(",")[0], str(len(pairs(letter, arm))), baseline(letter, arm)]
        row += [f"{mean(letter, arm, 'f1_tuned'):+.3f} ({both(letter, arm, 'f1_tuned')})", *precision_of(letter, arm)]
        shown.append(f"| {' | '.join(row)} |")
    fewer = (precision_of(LETTERS[loss], arm)[0].removeprefix("-") for loss, arm in HARDER.items())
    shown.append("{} and {} fewer false positive pixels".format(*fewer))
    gate = pairs("u", HARDER["dice + bce"])
    shown.append("find {:.0f} % of the lesions instead of {:.0f} %".format(*share_of_lesions_found()))
    found = [f"{end:+.3f}" for end in over_both(gate, "lesion_recall", tuned=True).interval]
    gained = mean("u", HARDER["dice + bce"], "lesion_recall_tuned")
    shown.append(f"the recall of lesions rose by {gained:+.3f} ({' to '.join(found)}), in each of the seven seeds")
    shown += synthetic_sentences()
    holds(readme, shown)
    for known in shown:
        readme = readme.replace(known, "")
    assert FIGURE.findall(readme) == []
    for arm in ("both", "bce + edge"):
        assert max(of_each_seed(pairs("a", arm), "f1")) < 0


def disc(run):
    """Pixels of the optic disc that are marked, per photograph, at 0.5."""
    return run["test"]["disc_fp"]


def test_the_notes_on_single_questions_say_what_the_runs_say():
    page = (ROOT / "docs/results-tables.md").read_text()
    notes = page[page.index("## Notes") : page.index("## Tables")]
    edge = [pair for pair in pairs("a", "bce + edge") if all("f1_tuned" in run["test"] for run in pair)]
    first = {arm: pairs("a", arm) for arm in ("hecl", "bce + density")}
    lead = {arm: of_each_seed([max(own, key=_lead)], "f1") + of_each_seed([max(own, key=_lead)], "f1_tuned")
            for arm, own in first.items()}  # fmt: skip
    b = {arm: runs[0] for arm, runs in ARMS["b"].items()}
    marked = [p["disc_fp"] for p in b["bce, disc ignored"]["test"]["photographs"]]
    across = {arm: summary._cosine(ARMS["k"][arm], 1) for arm in ("dice + bce", "tversky", "bce", "edge, ramp")}
    on_both = [one["test"]["f1"] - other["test"]["f1"] for one, other in paired(ARMS["e"]["bce"], ARMS["a"]["bce"])]
    fold = {
        arm: -np.mean(of_each_seed(summary._pairs(QUESTIONS["s"], ARMS["s"])[arm], "f1", tested=False))
        for arm in ("bce + edge", "bce + edge, short")
    }
    all_four = of_each_seed(pairs("h", "edge, ramp, MA+HE+EX+SE"), "small_recall_tuned")
    ours, other = pairs("n", "edge, ramp, 2848, patch and bands in share")[0]
    small = [total([run], "small_found") for run in (other, ours)]
    (nothing,) = of_each_seed(all_short()["bce + density / 1000, short"], "f1_tuned", tested=False)
    hecl = [disc(run) for run in ARMS["a"]["hecl"]]
    dice = sorted(disc(run) for run in ARMS["k"]["dice + bce"])
    alone = sorted(disc(run) for run in ARMS["t"]["dice + bce"])
    shown = [
        f"In the {_words(len(edge))} seeds counted at both thresholds the loss is "
        f"{np.mean(of_each_seed(edge, 'f1')):+.3f} at 0.5 and {np.mean(of_each_seed(edge, 'f1_tuned')):+.3f}",
        "goes from {:+.3f} to {:+.3f}, density from {:+.3f} to {:+.3f}".format(*lead["hecl"], *lead["bce + density"]),
        f"{hecl[0]:.0f} pixels of disc a photograph in seed 0, and at most {max(hecl[1:]):.1f}",
        f"marks {disc(b['both']):.0f} pixels of disc a photograph, "
        f"and {disc(b['both, disc ignored by the terms']):.0f} where the terms",
        f"BCE marks {np.mean(marked):,.0f} pixels a photograph, {max(marked):,} at most",
        f"F1 falls by {-mean('b', 'bce, disc ignored', 'f1_tuned'):.3f}",
        "ends at {} with Dice + BCE and {} with Tversky, at {} with BCE and {} with".format(*across.values()),
        f"marks {dice[-2]:.0f} and {dice[-1]:.0f} pixels of disc a photograph in two of ten seeds",
        f"differs by {min(on_both):+.3f} to {max(on_both):+.3f}",
        f"loses {fold['bce + edge']:.3f} at 900 steps and {fold['bce + edge, short']:.3f} at 450",
        f"comes out at {nothing:+.3f}",
        f"marks {alone[-1]:.0f} pixels of disc a photograph in one of three seeds",
        f"pulls {summary._pull(ARMS['h']['edge, ramp, MA'], 'features', 'edge').split('; ')[1]} times as hard as BCE",
        "({:+.3f} and {:+.3f})".format(*all_four),
        f"marks {disc(ours):.0f} pixels of disc a photograph at 0.5, BCE {disc(other):.0f}",
        f"Of the {sum(p['small'] for p in ours['test']['photographs'])} lesions under 25 pixels BCE finds {small[0]}",
    ]
    holds(notes, shown)
    assert small[1] == 0
    assert max(dice[:-2]) < 1
    assert max(of_each_seed(pairs("a", "bce + edge"), "f1")) < 0
    assert max(alone[:-1], default=0) < 1
    assert max(disc(run) for arm, runs in ARMS["t"].items() if arm != "dice + bce" for run in runs) < 1
    for known in shown:
        notes = notes.replace(known, "")
    assert FIGURE.findall(notes) == []


def _lead(pair):
    return pair[0]["test"]["f1"] - pair[1]["test"]["f1"] if "f1_tuned" in pair[0]["test"] else -1


def _words(number):
    return {3: "three"}[number]


def test_the_advice_says_what_the_runs_say():
    page = (ROOT / "docs/options.md").read_text()
    peers, ramps = HARDER.keys(), [RAMPS[loss] for loss in HARDER]
    counts = [
        [needed("k", arm) for arm in ramps] + [needed(LETTERS[loss], arm) for loss, arm in HARDER.items()],
        [needed("k", RAMPS["bce"]), needed("e", "edge / 50")],
        [needed("k", loss) for loss in peers],
    ]
    worth = [
        np.mean([run["test"]["f1_tuned"] - run["test"]["f1"] for run in ARMS[letter][arm]])
        for letter, arm in (("e", "bce"), ("k", "bce"), ("k", "dice + bce"))
    ]
    holds(
        page,
        [
            "{} to {} seeds for the edge term on Dice + BCE or Tversky, {} to {} on BCE, {} to {} between".format(
                *(end for own in counts for end in (min(own), max(own)))
            ),
            *(f"{NAMES[loss]} {full('k', loss, 'f1_tuned')}" for loss in peers),
            "average precision {:+.3f} and {:+.3f}".format(*(mean("k", loss, "average_precision") for loss in peers)),
            "{:+.3f} and {:+.3f} (three)".format(*(mean("c", a, "f1_tuned") for a in ("focal", "hausdorff + bce"))),
            f"worth {worth[0]:.3f} and {worth[1]:.3f} to BCE alone",
            f"it cost Dice + BCE {-worth[2]:.3f}",
            *(f"{NAMES[loss]} {full(LETTERS[loss], arm, 'f1_tuned')}" for loss, arm in HARDER.items()),
            "{:+.3f} and {:+.3f} (ten seeds)".format(*(mean("k", arm, "f1_tuned") for arm in ramps)),
            f"F1 {full('k', RAMPS['bce'], 'f1_tuned')}",
            f"small-lesion recall {full('k', RAMPS['bce'], 'small_recall_tuned')}",
            f"The paper's weights: {mean('a', 'both', 'f1_tuned'):+.3f} (three)",
        ],
    )
    pulled = "pulled {} and {} times as hard".format(*(f"{float(pull):.2f}" for pull in pulls().values()))
    holds(page, [pulled])
    holds((ROOT / "docs/setting.md").read_text(), [pulled])


@pytest.mark.parametrize("letter", ["e", "k", "t"])
def test_the_pages_compare_runs_of_one_device(letter):
    question = QUESTIONS[letter]
    for arm in question.arms:
        runs = runs_of(arm, question, LINES)
        assert {run.get("device", "cpu") for run in runs} == {question.device}


def test_the_page_shows_the_errors_that_were_counted():
    page = (ROOT / "docs/evidence.md").read_text()
    found = json.loads((ROOT / "benchmarks/results/errors.json").read_text())
    assert list(found) == ["dice + bce", "dice + bce + edge / 5, ramp"]
    assert [run["seed"] for run in found["dice + bce"]] == [25, 26, 27, 28, 29]
    kinds = [dict(zip(errors.KINDS, errors.by_kind(runs).values(), strict=True)) for runs in found.values()]
    rest = [one["fp_between"] + one["fn_inside"] for one in kinds]
    touched = [
        [
            f"{np.mean([run[f'touched_{size}'] / run[f'lesions_{size}'] for run in runs]) * 100:.0f} %"
            for size in (1, 10)
        ]
        for runs in found.values()
    ]
    cells = [
        ["{fp_near:.1f}; {fn_near:.1f}".format(**one) for one in kinds],
        ["{fp_far:.1f}".format(**one) for one in kinds],
        ["{fn_missed:.1f}".format(**one) for one in kinds],
        [f"{one:.1f}" for one in rest],
        ["; ".join(one) for one in touched],
    ]
    holds(page, [f" | {' | '.join(row)} |\n" for row in cells])
    for one in kinds:
        assert (one["fp_near"] + one["fn_near"]) / sum(one.values()) == pytest.approx(0.6, abs=0.03)
    for runs in found.values():
        for run in runs:
            missed = [run[f"lesions_{size}"] - run[f"touched_{size}"] for size in (1, 10, 25, 100)]
            assert sum(missed[:2]) > 0.9 * sum(missed)
