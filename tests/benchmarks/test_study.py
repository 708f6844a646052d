"""The study runs, goes on where it stopped, pairs its arms, and its summary says what its lines say."""

import dataclasses
import fcntl
import json
from pathlib import Path

import errors
import external
import numpy as np
import pytest
import study
import summary
import torch
from data import photographs
from matplotlib.colors import to_rgb
from measure.lesion_scores import FIRST_THRESHOLDS, THRESHOLDS, counts
from PIL import Image
from scipy import stats
from test_objective import Network
from test_photographs import eye_and_mask, write_all
from test_tiles import write_tiles
from torch import nn
from trials import kept
from trials.differences import holm, of_each_seed, over_both, over_photographs, over_seeds, paired, pooled
from trials.evaluation import best_thresholds, evaluation
from trials.objective import Settings
from trials.plots import COLOURS, write_differences
from trials.questions import QUESTIONS, Question
from trials.record import read_lines, runs_of
from trials.similarity import band_similarity

TINY = Settings(size=48, crop=32, batch=2, steps=3)
ARMS = {
    "bce": TINY,
    "both": dataclasses.replace(TINY, alpha=0.02, beta=0.1, density={"patch_size": 4, "threshold": 0.1}),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Small photographs, a small network and a question of two arms."""
    write_all(tmp_path / "data", "train", 6)
    write_all(tmp_path / "data", "test", 3)

    def network(_, classes, seed):
        torch.manual_seed(seed)
        return Network(classes)

    monkeypatch.setattr(photographs, "EYE", (0, 10**4))
    monkeypatch.setattr(study, "network", network)
    monkeypatch.setattr(study, "NORMS_EVERY", 2)
    monkeypatch.setattr(study, "CURVE_EVERY", 2)
    for letter, tested in (("a", True), ("d", False)):
        monkeypatch.setitem(QUESTIONS, letter, Question(ARMS, range(2), tested))
    return tmp_path


def run(folder, *arguments):
    """The lines of the file after a run of the study."""
    paths = ["--data", folder / "data", "--cache", folder / "cache", "--results", folder / "study.jsonl"]
    threads = torch.get_num_threads()
    assert study.main([*map(str, paths), *arguments]) == 0
    torch.set_num_threads(threads)
    return [json.loads(line) for line in (folder / "study.jsonl").read_text().splitlines()]


def test_a_line_holds_all_that_the_protocol_asks_for(folder):
    lines = run(folder, "--question", "a", "--seeds", "1")
    assert [(line["arm"], line["seed"]) for line in lines] == [("bce", 0), ("both", 0)]
    for line in lines:
        assert [point["step"] for point in line["curve"]] == [2, 3]
        assert {"step", *line["test"]} - set(line["curve"][0]) == {"photographs", "tuned"}
        best = np.argmax(line["curve"][-1]["f1_by_threshold"][0])
        assert line["test"]["tuned"]["f1"] == pytest.approx(line["test"]["f1_by_threshold"][0][best], abs=1e-5)
        assert [photograph["name"] for photograph in line["test"]["photographs"]] == [f"IDRiD_0{n}" for n in (1, 2, 3)]
        assert 0 < line["loss_forward_seconds"]["median"] < line["step_seconds"]["median"]
        assert len(line["losses"]) == 2
        assert len(line["similarity"]) == 2
    bce, both = lines
    assert bce["gradient_norms"] == []
    assert bce["active"] == {"density": 0, "edge": 0}
    assert [point["step"] for point in both["gradient_norms"]] == [0, 2]
    assert both["active"]["edge"] > 0
    assert both["settings"]["alpha"] == 0.02


def test_the_network_of_a_run_is_kept(folder):
    lines = run(folder, "--question", "a", "--seeds", "1")
    samples = photographs.photographs(folder / "data", "test", 48, folder / "cache")
    for line in lines:
        model = Network(1)
        model.load_state_dict(torch.load(folder / "cache" / "networks" / f"{line['arm']}, seed 0, cpu.pt"))
        assert evaluation(model, samples, TINY)["photographs"] == line["test"]["photographs"]


def test_lesions_are_counted_on_the_fold_at_its_best_threshold(folder):
    for line in run(folder, "--question", "d", "--seeds", "1"):
        best = max(line["curve"][-1]["f1_by_threshold"][0])
        assert line["fold"]["f1"] == pytest.approx(best, abs=1e-5)
        assert 0 <= line["fold"]["lesion_f1"] <= 1


def test_the_study_goes_on_where_it_stopped(folder):
    first = run(folder, "--question", "a", "--seeds", "1")
    everything = run(folder, "--question", "a")
    assert everything[:2] == first
    assert sorted((line["arm"], line["seed"]) for line in everything) == [
        ("bce", 0), ("bce", 1), ("both", 0), ("both", 1),
    ]  # fmt: skip
    assert run(folder, "--question", "a") == everything
    assert run(folder, "--question", "d") == everything


def test_a_question_of_choice_leaves_the_test_photographs_alone(folder):
    lines = run(folder, "--question", "d", "--seeds", "1")
    assert all("test" not in line for line in lines)
    assert len(run(folder, "--question", "a", "--seeds", "1")) == 4


def test_a_run_that_another_process_is_at_is_left_to_it(folder):
    claims = folder / "cache" / "claims"
    claims.mkdir(parents=True)
    with (claims / "bce, seed 1, cpu").open("w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        lines = run(folder, "--question", "a")
    assert sorted((line["arm"], line["seed"]) for line in lines) == [("bce", 0), ("both", 0), ("both", 1)]
    assert len(run(folder, "--question", "a")) == 4


def test_arms_of_a_seed_are_one_run_where_the_terms_weigh_nothing(folder, monkeypatch):
    light = dataclasses.replace(ARMS["both"], alpha=1e-30, beta=1e-30)
    monkeypatch.setitem(QUESTIONS, "a", Question({"bce": TINY, "light": light}, range(1), tested=True))
    bce, light = run(folder, "--question", "a")
    assert light["active"]["edge"] > 0
    for name in ("curve", "test"):
        assert bce[name] == light[name]


@pytest.mark.cuda
def test_a_run_on_cuda_is_that_on_the_cpu_and_counts_for_its_own_questions(folder, monkeypatch):
    on_cpu = run(folder, "--question", "a", "--seeds", "1")
    monkeypatch.setitem(QUESTIONS, "a", Question(ARMS, range(2), tested=True, device="cuda"))
    on_cuda = run(folder, "--question", "a", "--seeds", "1")[2:]
    assert [line["device"] for line in on_cpu + on_cuda] == ["cpu", "cpu", "cuda", "cuda"]
    for one, other in zip(on_cpu, on_cuda, strict=True):
        assert (one["arm"], one["settings"]) == (other["arm"], other["settings"])
        assert one["losses"] == [pytest.approx(losses, rel=0.01) for losses in other["losses"]]
        assert len(other["similarity"]) == 2


def test_a_question_for_cuda_is_refused_in_one_sentence_where_there_is_none(folder, monkeypatch, capsys):
    monkeypatch.setitem(QUESTIONS, "a", Question(ARMS, range(2), tested=True, device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        run(folder, "--question", "a")
    assert "question a needs CUDA" in capsys.readouterr().err


def test_a_data_error_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    arguments = ["--data", str(tmp_path / "no"), "--question", "a", "--cache", str(tmp_path), "--results"]
    assert study.main([*arguments, str(tmp_path / "lines")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_learning_rate_rises_and_falls_to_0():
    rates = [study._rate(i / 900, i) for i in range(901)]
    top = rates.index(max(rates))
    assert top == study.WARM_UP - 1
    assert rates[:top] == sorted(set(rates[:top]))
    assert rates[top:] == sorted(set(rates[top:]), reverse=True)
    assert rates[-1] == pytest.approx(0)


def made_up(arm, seed, hits, settings=TINY, tested=True, lesions=("EX",)):
    """A line whose photographs have so many hits among 10 lesion pixels, for each lesion one more.

    The fold's F1 is half the test's; of lesion k it is largest at threshold seed + k, where the test's is seed + k %.
    """
    photographs = [
        {**dict.fromkeys(counts(*np.zeros((3, 1, 1), bool)), 0), "name": str(i), "lesion": name, "tp": n, "fn": 10 - n}
        for k, name in enumerate(lesions)
        for i, n in enumerate(np.add(hits, k).tolist())
    ]
    scores = {name: 0.25 for name in summary.SHOWN if not name.endswith("_tuned") and name != "threshold"}
    scores["f1"] = float(np.mean([2 * p["tp"] / (10 + p["tp"]) for p in photographs]))
    levels = range(len(THRESHOLDS))
    fold = {"f1_by_threshold": [[0.5 + 0.01 * (n == seed + k) for n in levels] for k in range(len(lesions))]}
    others = {"f1_by_threshold": [[n / 100 for n in levels] for _ in lesions]}
    test = {"test": {**scores, **others, "photographs": photographs}} if tested else {}
    return {
        "arm": arm,
        "seed": seed,
        "tested": tested,
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "curve": [{"step": 3, **scores, "f1": scores["f1"] / 2, **fold}],
        "active": {"density": 0.5, "edge": 1},
        "gradient_norms": [],
        "similarity": [{}, {}],
        **test,
    }


def test_differences_are_paired_by_seed():
    runs = [made_up("a", seed, [5 + seed, 4]) for seed in (2, 0, 1)]
    others = [made_up("b", seed, [3, 4]) for seed in (0, 1, 2, 3)]
    pairs = paired(runs, others)
    scores = [(run["test"]["f1"], others[run["seed"]]["test"]["f1"]) for run in runs]
    wanted = stats.ttest_rel(*zip(*scores, strict=True)).confidence_interval(0.95)
    differences = of_each_seed(pairs, "f1")
    assert differences == [one - other for one, other in scores]
    found = over_seeds(differences)
    assert found.interval == pytest.approx((wanted.low, wanted.high))
    assert found.p == pytest.approx(stats.ttest_rel(*zip(*scores, strict=True)).pvalue)
    assert of_each_seed(pairs, "f1", tested=False) == [one / 2 - other / 2 for one, other in scores]
    assert over_photographs(pairs, "f1").mean == pytest.approx(found.mean)


def test_the_bootstrap_draws_photographs_with_all_their_lesions():
    lesions = ("MA", "EX")
    pairs = [(made_up("a", 0, [6, 3], lesions=lesions), made_up("b", 0, [5, 5], lesions=lesions))]
    found = over_photographs(pairs, "f1")
    assert [found.mean] == pytest.approx(of_each_seed(pairs, "f1"))
    # Two photographs can be drawn in three ways, of which the middle one is the mean.
    extremes = [np.mean([2 * (n + k) / (10 + n + k) - 2 * (5 + k) / (15 + k) for k in (0, 1)]) for n in (3, 6)]
    assert found.interval == pytest.approx(extremes)


@pytest.mark.parametrize("differences", [[0.1], [0.1, 0.3]])
def test_one_or_two_seeds_have_no_interval(differences):
    assert over_seeds(differences) == (np.mean(differences), None, None)


def test_the_bootstrap_is_as_wide_as_photographs_differ():
    even, uneven = (
        over_photographs([(made_up("a", 0, hits), made_up("b", 0, [5] * 20))], "f1")
        for hits in ([6] * 20, [9] * 10 + [3] * 10)
    )
    assert even.interval == pytest.approx((even.mean, even.mean))
    assert uneven.interval[0] < 0 < uneven.interval[1]
    assert uneven.interval[0] < uneven.mean < uneven.interval[1]


def of_table(table):
    """Pairs, one a row, whose photographs differ in false positives inside the disc by the columns."""
    pairs = []
    for seed, row in enumerate(np.asarray(table).tolist()):
        pairs.append((made_up("a", seed, [5] * len(row)), made_up("b", seed, [5] * len(row))))
        for photograph, difference in zip(pairs[-1][0]["test"]["photographs"], row, strict=True):
            photograph["disc_fp"] = difference
    return pairs


def test_seeds_and_photographs_as_random_are_seeds_alone_where_photographs_agree():
    seeds = np.array([3, 8, 4, 9])
    found = over_both(of_table(np.tile(seeds[:, None], 6)), "disc_fp")
    assert (found.mean, *found.interval) == pytest.approx((seeds.mean(), *over_seeds(seeds).interval))
    assert found.p == pytest.approx(stats.ttest_1samp(seeds, 0).pvalue)


def test_seeds_and_photographs_as_random_are_photographs_alone_where_seeds_agree():
    photographs = np.array([3, 8, -4, 9, 1])
    found = over_both(of_table(np.tile(photographs, (3, 1))), "disc_fp")
    wanted = stats.ttest_1samp(photographs, 0)
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval()))
    assert found.p == pytest.approx(wanted.pvalue)


def test_variances_of_seeds_and_of_photographs_add():
    seeds, photographs = np.array([0, 3, 9]), np.array([0, 10, 40, 20])
    found = over_both(of_table(seeds[:, None] + photographs), "disc_fp")
    parts = np.var(seeds, ddof=1) / 3, np.var(photographs, ddof=1) / 4
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 3)  # Satterthwaite's, of independent variances
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    mean = seeds.mean() + photographs.mean()
    assert found.interval == pytest.approx((mean - half, mean + half))


@pytest.mark.parametrize(("of_seeds", "of_photographs"), [(50, 50), (0, 50), (50, 0), (0, 0)])
def test_the_variances_are_those_of_differences_between_entries_and_none_is_negative(of_seeds, of_photographs):
    random, (n, m) = np.random.default_rng(1), (4, 6)
    table = np.round(random.normal(7, 20, (n, m)))
    # Whichever effect is not asked for, is taken out of the table, so that its estimate is negative.
    table += of_seeds * np.arange(n)[:, None] if of_seeds else -table.mean(1, keepdims=True)
    table += of_photographs * np.arange(m) if of_photographs else -table.mean(0, keepdims=True)
    table = np.round(1000 * table).astype(int)
    halves = {(True, False): [], (False, True): [], (True, True): []}
    for i, j in np.ndindex(n, m):
        for other, place in np.ndindex(n, m):
            if (i, j) != (other, place):
                halves[i != other, j != place].append((table[i, j] - table[other, place]) ** 2 / 2)
    rows, columns, both = (np.mean(halves[kind]) for kind in ((True, False), (False, True), (True, True)))
    rest, seeds, photographs = rows + columns - both, max(0, both - columns), max(0, both - rows)
    assert (seeds > 0, photographs > 0) == (of_seeds > 0, of_photographs > 0)
    variance = seeds / n + photographs / m + rest / (n * m)
    squares = [(seeds > 0, m * seeds + rest, n - 1), (photographs > 0, n * photographs + rest, m - 1)]
    squares.append((1 - (seeds > 0) - (photographs > 0), rest, (n - 1) * (m - 1)))
    freedom = variance**2 / sum((times * square / (n * m)) ** 2 / own for times, square, own in squares)
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    found = over_both(of_table(table), "disc_fp")
    assert found.interval == pytest.approx((table.mean() - half, table.mean() + half))


def test_seeds_and_photographs_as_random_cover_the_truth_where_seeds_alone_do_not():
    random = np.random.default_rng(0)
    covered = np.zeros(2)
    for _ in range(300):
        seed, photograph, rest = (random.normal(0, s, shape) for s, shape in ((30, (5, 1)), (90, 10), (60, (5, 10))))
        pairs = of_table(np.round(seed + photograph + rest).astype(int))
        for k, found in enumerate((over_both(pairs, "disc_fp"), over_seeds(of_means(pairs)))):
            covered[k] += found.interval[0] < 0 < found.interval[1]
    assert 0.92 < covered[0] / 300 < 0.985
    assert covered[1] / 300 < 0.85


def of_means(pairs):
    return [np.mean([p["disc_fp"] for p in one["test"]["photographs"]]) for one, _ in pairs]


def test_a_metric_that_is_no_mean_of_photographs_has_an_interval_over_both():
    hits = np.array([[6, 3, 8, 1], [7, 2, 9, 1], [5, 4, 8, 3]])
    pairs = [(made_up("a", seed, row), made_up("b", seed, [4, 3, 5, 2])) for seed, row in enumerate(hits)]
    for pair in pairs:
        for run in pair:
            for place, photograph in enumerate(run["test"]["photographs"]):
                photograph |= {"small": 10 + place, "small_found": photograph["tp"]}
    found = over_both(pairs, "small_recall")
    assert found.mean == pytest.approx(np.mean(hits.sum(1) - 14) / 46)
    # By hand: what each photograph adds, by leaving it out.
    sizes, added = np.arange(10, 14), hits - np.array([4, 3, 5, 2])
    parts = 4 * added.sum(1, keepdims=True) / 46 - 3 * (added.sum(1, keepdims=True) - added) / (46 - sizes)
    scaled = np.round(1e6 * parts).astype(int)
    assert np.subtract(*found.interval) == pytest.approx(
        np.subtract(*over_both(of_table(scaled), "disc_fp").interval) / 1e6, rel=1e-4
    )


@pytest.mark.parametrize("table", [[[1, 2, 3]] * 2, [[1], [2], [3]]])
def test_two_seeds_or_one_photograph_have_no_interval_over_both(table):
    found = over_both(of_table(table), "disc_fp")
    assert (found.mean, found.interval) == (pytest.approx(np.mean(table)), None)


def test_an_adjusted_p_value_is_the_smallest_level_at_which_holm_rejects():
    values = [0.01, 0.6, 0.012, 0.03, 0.03]

    def rejected(level):
        order = sorted(range(len(values)), key=values.__getitem__)
        passed = [values[place] <= level / (len(values) - rank) for rank, place in enumerate(order)]
        return {place for rank, place in enumerate(order) if all(passed[: rank + 1])}

    for place, adjusted in enumerate(holm(values)):
        assert place in rejected(adjusted * 1.0001)
        assert place not in rejected(adjusted * 0.9999)
    assert holm([0.7, 0.8]) == [1, 1]
    assert holm([]) == []


def test_the_pooled_deviation_weighs_comparisons_by_their_seeds():
    assert pooled([[0, 2], [5, 5, 5]]) == pytest.approx(((2 / 3) ** 0.5, 3))
    one = [0.1, 0.4, 0.2]
    assert pooled([one]) == pytest.approx((np.std(one, ddof=1), 2))


def test_families_of_a_question_are_adjusted_apart():
    arms = {
        "bce": TINY,
        "tversky": dataclasses.replace(TINY, supervised="tversky"),
        "edge": dataclasses.replace(TINY, beta=0.1),
        "density": dataclasses.replace(TINY, alpha=0.1),
    }
    question = Question(arms, range(3), tested=True)
    lines = [
        made_up(name, seed, [3 + k + (seed * k) % 3, 4 + seed], settings)
        for k, (name, settings) in enumerate(arms.items())
        for seed in range(3)
    ]
    found = summary._arms(question, lines)
    cells = {name: cell[-2] for name, (*_, cell) in rows(summary.answer("x", question, found)).items() if name in arms}
    pairs = summary._pairs(question, found)
    ps = {name: (over_seeds(of_each_seed(own, "f1")).p, over_both(own, "f1").p) for name, own in pairs.items()}
    wanted = {"tversky": ps["tversky"]}
    adjusted = [holm([ps[name][k] for name in ("edge", "density")]) for k in (0, 1)]
    wanted |= {name: tuple(column[k] for column in adjusted) for k, name in enumerate(("edge", "density"))}
    assert {name: cells[name] for name in wanted} == {n: f"{p:.3f} [{both:.3f}]" for n, (p, both) in wanted.items()}


OTHER = {
    "bce": TINY,
    "both": ARMS["both"],
    "bce, SE": dataclasses.replace(TINY, lesions=("SE",)),
    "both, SE": dataclasses.replace(ARMS["both"], lesions=("SE",)),
}


def test_an_arm_is_compared_with_bce_of_its_own_kind():
    question = Question(OTHER, range(2), tested=True)
    assert {name: question.baseline(name) for name in OTHER} == {
        "bce": None, "both": "bce", "bce, SE": None, "both, SE": "bce, SE",
    }  # fmt: skip
    assert Question({"both": ARMS["both"]}, range(2), tested=True).baseline("both") is None


def test_terms_on_another_supervised_loss_are_compared_with_that_loss_alone():
    arms = {
        "bce": TINY,
        "both": ARMS["both"],
        "tversky": dataclasses.replace(TINY, supervised="tversky"),
        "tversky + both": dataclasses.replace(ARMS["both"], supervised="tversky"),
        "focal + both": dataclasses.replace(ARMS["both"], supervised="focal"),
        "tversky + both, no disc": dataclasses.replace(ARMS["both"], supervised="tversky", disc="ignored by the terms"),
    }
    question = Question(arms, range(2), tested=True)
    assert {name: question.baseline(name) for name in arms} == {
        "bce": None, "both": "bce", "tversky": "bce", "tversky + both": "tversky", "focal + both": "bce",
        "tversky + both, no disc": "tversky",
    }  # fmt: skip
    lines = [made_up(name, seed, [k], settings) for k, (name, settings) in enumerate(arms.items()) for seed in (0, 1)]
    text = summary.answer("x", question, summary._arms(question, lines))
    named, compared = rows(text), "minus BCE, or what the row names, of the same seeds"
    assert any(name.startswith(compared) for name in named)
    assert len(named["tversky + both, minus tversky"]) == 1
    # Metrics and differences.
    assert [len(named[name]) for name in ("both", "tversky", "focal + both", "tversky + both")] == [2, 2, 2, 1]


def test_an_arm_that_ignores_pixels_is_compared_with_bce_that_does():
    arms = {
        f"{name}, {disc}": dataclasses.replace(settings, disc=disc)
        for name, settings in ARMS.items()
        for disc in ("background", "ignored", "ignored by the terms")
        if (name, disc) != ("bce", "ignored by the terms")
    }
    question = Question(arms, range(2), tested=True)
    assert {name: question.baseline(name) for name in arms} == {
        "bce, background": None,
        "bce, ignored": "bce, background",
        "both, background": "bce, background",
        "both, ignored": "bce, ignored",
        "both, ignored by the terms": "bce, background",
    }


def test_lines_answer_a_question_with_their_settings_seeds_and_test():
    lines = [
        made_up("both", 1, [1], ARMS["both"]),
        made_up("both", 0, [2], ARMS["both"]),
        made_up("both", 1, [3], ARMS["both"]),
        made_up("both", 1, [4], ARMS["both"], tested=False),
        made_up("both", 2, [5], ARMS["both"]),
        made_up("both", 1, [6], TINY),
        {**made_up("both", 0, [7], ARMS["both"]), "device": "cuda"},
    ]
    assert runs_of("both", Question(ARMS, range(2), tested=True), lines) == [lines[1], lines[2]]
    assert runs_of("both", Question(ARMS, range(2), tested=False), lines) == [lines[1], lines[3]]
    assert runs_of("both", Question(ARMS, range(2), tested=True, device="cuda"), lines) == [lines[6]]


def rows(text):
    """The cells of each row of the tables in a text, by its first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    found = {}
    for name, *rest in cells:
        found.setdefault(name, []).append(rest)
    return found


def test_the_threshold_is_chosen_on_the_fold():
    runs = [made_up("bce", seed, [5]) for seed in (3, 7)]
    unknown, flat = made_up("bce", 5, [5]), made_up("bce", 8, [5])  # as lines of old have them
    for part in (unknown["test"], unknown["curve"][-1]):
        del part["f1_by_threshold"]
    for part in (flat["test"], flat["curve"][-1]):
        part["f1_by_threshold"] = part["f1_by_threshold"][0][: len(FIRST_THRESHOLDS)]
    question = Question({"bce": TINY}, range(9), tested=True)
    found = summary._arms(question, [*runs, unknown, flat])["bce"]
    assert [(run["test"]["threshold"], run["test"]["f1_tuned"]) for run in (found[0], *found[2:])] == [
        *((THRESHOLDS[n], n / 100) for n in (3, 7)),
        (FIRST_THRESHOLDS[8], 0.08),
    ]
    assert found[0]["curve"][-1]["f1_tuned"] == 0.51
    assert found[1] == unknown
    cells = rows(summary.answer("x", question, {"bce": found[:3]}))["bce"][0]
    thresholds = np.take(THRESHOLDS, (3, 7))
    assert cells[-1] == f"{np.mean(thresholds):.3f} ± {np.std(thresholds, ddof=1):.3f} (2 seeds)"


def test_small_lesions_and_boundaries_are_compared_at_that_threshold_too():
    runs = [made_up(arm, 3, [5], ARMS[arm]) for arm in ARMS]
    question = Question(ARMS, range(9), tested=True)
    assert "small-lesion recall, best threshold" not in summary.answer("x", question, summary._arms(question, runs))
    for run, recall in zip(runs, (0.3, 0.45), strict=True):
        run["test"]["tuned"] = {"small_recall": recall, "boundary_f1": 0.1, "photographs": run["test"]["photographs"]}
    text = summary.answer("x", question, summary._arms(question, runs))
    assert [line.count("small-lesion recall, best threshold") for line in text.splitlines() if "minus" in line] == [1]
    assert "+0.150; " in text


def test_each_lesion_has_a_threshold_of_its_own():
    settings = dataclasses.replace(TINY, lesions=("MA", "EX"))
    (found,) = summary._arms(
        Question({"bce": settings}, range(9), tested=True), [made_up("bce", 3, [5], settings, lesions=("MA", "EX"))]
    )["bce"]
    assert found["test"]["threshold"] == pytest.approx(np.mean(THRESHOLDS[3:5]))
    assert found["test"]["f1_tuned"] == pytest.approx(np.mean([0.03, 0.04]))


def test_the_bootstrap_is_of_the_counts_at_the_threshold_asked_for():
    pairs = [(made_up("a", 0, [6] * 9), made_up("b", 0, [5] * 9))]
    for run, hits in zip(pairs[0], (8, 4), strict=True):
        run["test"]["tuned"] = made_up("c", 0, [hits] * 9)["test"]
    mean = 2 * 8 / 18 - 2 * 4 / 14
    found = over_photographs(pairs, "f1", tuned=True)
    assert [found.mean, *found.interval] == pytest.approx([mean] * 3)
    assert over_photographs(pairs, "f1").mean < mean
    assert summary._bootstrap(pairs, "f1_tuned") == f"; {mean:+.3f} to {mean:+.3f}"
    assert summary._bootstrap(pairs, "average_precision") == ""
    del pairs[0][1]["test"]["tuned"]
    assert summary._bootstrap(pairs, "f1_tuned") == ""


class Guesses(nn.Module):
    """Random logits of two lesions."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))  # says on which device it is

    def forward(self, images):
        return torch.randn(len(images), 2, *images.shape[2:], generator=torch.Generator().manual_seed(images.shape[3]))


def test_f1_by_threshold_has_f1_at_0_5_and_at_the_tuned_thresholds(folder):
    samples = photographs.photographs(folder / "data", "train", 48, folder / "cache")
    settings = dataclasses.replace(TINY, lesions=("EX", "SE"))
    levels = 28, 35
    found = evaluation(Guesses(), samples, settings, [THRESHOLDS[level] for level in levels])
    by_threshold = np.array(found["f1_by_threshold"])
    assert by_threshold.shape == (2, len(THRESHOLDS))
    assert {p["lesion"] for p in found["photographs"] if p["tp"] + p["fn"]} == {"EX", "SE"}
    assert found["f1"] > 0.01
    assert np.mean(by_threshold[:, THRESHOLDS.index(0.5)]) == pytest.approx(found["f1"], abs=1e-5)
    tuned = [by_threshold[k, level] for k, level in enumerate(levels)]
    assert np.mean(tuned) == pytest.approx(found["tuned"]["f1"], abs=1e-5)
    assert abs(found["tuned"]["f1"] - found["f1"]) > 1e-3
    untuned = evaluation(Guesses(), samples, settings)
    assert untuned == {name: value for name, value in found.items() if name != "tuned"}


def test_the_best_threshold_is_that_of_each_lesion():
    flat = [0.1] * len(THRESHOLDS)
    assert best_thresholds([[*flat[:-1], 0.2], [0.2, *flat[1:]]]) == [THRESHOLDS[-1], THRESHOLDS[0]]


@pytest.mark.parametrize("tested", [True, False])
def test_the_answer_to_a_question_compares_its_runs_and_no_others(tested):
    question = Question(OTHER, range(2), tested)
    lines = [
        *(made_up("bce", seed, [2 + seed, 4], TINY, tested) for seed in (0, 1, 2)),
        *(made_up("both", seed, [6, 5], ARMS["both"], tested) for seed in (0, 1)),
        made_up("both, SE", 0, [9, 9], OTHER["both, SE"], tested),
    ]
    text = summary.answer("x", question, summary._arms(question, lines))
    assert text.startswith("### Question x: 5 of 8 runs")
    found = rows(text)
    scores = [(line["test"] if tested else line["curve"][-1])["f1"] for line in lines]
    assert found["bce"][0][:2] == ["2", f"{np.mean(scores[:2]):.3f} ± {np.std(scores[:2], ddof=1):.3f}"]
    assert len(found["bce"]) == 1
    assert len(found.get("both, SE", ())) == tested  # nothing to compare it with
    mean = np.mean([scores[3] - scores[0], scores[4] - scores[1]])
    assert len(found["both"]) == 1 + tested
    seeds, f1 = found["both"][-1][:2]
    assert seeds == "2"
    assert f1.startswith(f"{mean:+.3f} ({scores[3] - scores[0]:+.3f}, {scores[4] - scores[1]:+.3f})")
    assert (";" in f1) == tested
    assert text.endswith("Not run:\n\n- seeds 0, 1: bce, SE\n- seeds 1: both, SE")


def test_the_pull_of_a_term_is_its_weighted_gradient_beside_that_of_bce():
    line = made_up("both", 0, [1], ARMS["both"])
    norms = [({"supervised": 2.0, "density": 0.0, "edge": 4.0}), ({"supervised": 1.0, "density": 5.0, "edge": 8.0})]
    line["gradient_norms"] = [{"step": n, "features": norm, "first_layer": norm} for n, norm in enumerate(norms)]
    assert summary._pull([line], "features", "density") == f"{0.02 * 5:.3g}; {0.02 * 5 / (2 + 1):.3g}"
    assert summary._pull([line], "features", "edge") == f"{0.1 * (2 + 8) / 2:.3g}; {0.1 * (4 + 8) / (2 + 1):.3g}"
    line["settings"] |= {"weights": "ramp", "steps": 6}  # 0, then half of its weight
    assert summary._pull([line], "features", "edge") == f"{0.05 * 8:.3g}; {0.05 * 8 / (2 + 1):.3g}"
    line["settings"]["weights"] = "share"
    assert summary._pull([line], "features", "edge") == "-"


def test_a_question_waits_until_it_has_a_run_of_its_own():
    questions = {"a": Question({"bce": TINY}, range(2), tested=True), "d": Question(ARMS, range(3), tested=False)}
    lines = [made_up("bce", seed, [1]) for seed in (0, 1)]
    for more, waits in (([], True), ([made_up("both", 0, [1], ARMS["both"], tested=False)], False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(summary, "QUESTIONS", questions)
            text = summary.summary({name: summary._arms(q, lines + more) for name, q in questions.items()})
        assert ("Not begun: question d (4 runs)." in text) == waits
        assert ("### Question d: 3 of 6 runs" in text) != waits


def test_the_summary_prints_or_writes_and_leaves_the_rest_of_the_document(folder, capsys):
    run(folder, "--question", "a")
    arguments = ["--results", str(folder / "study.jsonl")]
    assert summary.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "### Question a: 4 of 4 runs" in printed
    assert "### Question f" not in printed
    assert "question f (36 runs)" in printed
    document = folder / "results.md"
    document.write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    assert summary.main([*arguments, "--document", str(document), "--plots", str(folder)]) == 0
    assert document.read_text() == f"before\n{summary.BEGIN}\n\n{printed}\n{summary.END}\nafter\n"
    for name in ("curves", "differences", "tuned", "settings", "doses"):
        with Image.open(folder / f"study-{name}.png") as picture:
            assert min(picture.size) > 150


def test_an_interval_is_drawn_from_three_seeds_on(tmp_path):
    blue = []
    for differences in ([-0.1, 0.1], [-0.1, 0.0, 0.1]):
        write_differences(tmp_path / "plot.png", {"both": differences}, "F1")
        with Image.open(tmp_path / "plot.png") as picture:
            colours = np.asarray(picture.convert("RGB"))
        blue.append(np.all(colours == np.round(255 * np.array(to_rgb(COLOURS[1]))), axis=2).sum())
    assert 0 < 3 * blue[0] < blue[1]


def test_the_page_of_tables_shows_the_recorded_runs(capsys):
    assert summary.main([]) == 0
    root = Path(summary.__file__).parents[1]
    assert capsys.readouterr().out.rstrip() in (root / "docs/results-tables.md").read_text()


class Knows(nn.Module):
    """Features that point one way in the lesion and another way outside."""

    def __init__(self, lesion):
        super().__init__()
        self.segmentation_head, self.lesion = nn.Sequential(nn.Conv2d(2, 1, 1)), lesion.float()

    def forward(self, images):
        inside = self.lesion[None, None, : images.shape[2], : images.shape[3]]
        return self.segmentation_head(torch.cat([inside, 1 - inside], 1))


def test_similarity_is_that_of_the_features_inside_and_outside_a_contour(folder):
    samples = photographs.photographs(folder / "data", "train", 60, folder / "cache60")[:1]
    model = Knows(samples[0].lesion[2])
    found = band_similarity(model, samples, TINY)
    assert found == pytest.approx({"inner": 1, "outer": 1, "across": 0, "norm": 1})
    assert model.training


def test_errors_are_those_of_the_kept_networks_on_their_folds(folder, monkeypatch, capsys):
    monkeypatch.setattr(kept, "network", study.network)
    lines = run(folder, "--question", "a")
    (folder / "cache/networks/both, seed 1, cpu.pt").unlink()
    paths = ["--data", folder / "data", "--cache", folder / "cache", "--results", folder / "study.jsonl"]
    paths += ["--json", folder / "errors.json", "--plot", folder / "errors.png"]
    assert errors.main(["--question", "a", *map(str, paths)]) == 0
    found = json.loads((folder / "errors.json").read_text())
    assert list(found) == ["bce", "both"]
    for line in lines[:2]:
        (counted,) = found[line["arm"]]
        fold = line["fold"]["photographs"]
        assert counted["seed"] == 0
        assert counted["fp_near"] + counted["fp_between"] + counted["fp_far"] == sum(p["fp"] for p in fold)
        assert counted["fn_near"] + counted["fn_inside"] + counted["fn_missed"] == sum(p["fn"] for p in fold)
        assert counted["lesion"] == sum(p["tp"] + p["fn"] for p in fold)
    printed = capsys.readouterr().out
    for arm, (counted,) in found.items():
        assert f"{100 * counted['fp_far'] / counted['lesion']:.1f}" in printed[printed.index(f"| {arm} ") :]
    with Image.open(folder / "errors.png") as picture:
        assert picture.size[0] == 800


def test_networks_that_are_not_there_are_asked_for(folder, capsys):
    assert errors.main(["--question", "a", "--data", str(folder / "data"), "--cache", str(folder / "cache")]) == 2
    assert "has no network of this question; train them with study.py" in capsys.readouterr().err


def test_kept_networks_are_judged_once_on_other_photographs_at_their_folds_threshold(folder, monkeypatch):
    monkeypatch.setattr(kept, "network", study.network)
    lines = run(folder, "--question", "a", "--seeds", "1")
    files = eye_and_mask(folder)
    names = [("--images", "images", files.image), ("--masks", "masks", files.mask)]
    arguments = ["--question", "a", "--output", folder / "external.jsonl"]
    arguments += ["--cache", folder / "cache", "--results", folder / "study.jsonl"]
    for option, name, file in names:
        (folder / name).mkdir()
        file.rename(folder / name / file.name)
        arguments += [option, folder / name]
    for _ in range(2):
        assert external.main(list(map(str, arguments))) == 0
    judged = read_lines(folder / "external.jsonl")
    assert [(line["arm"], line["seed"]) for line in judged] == [("bce", 0), ("both", 0)]
    for line, trained in zip(judged, lines, strict=True):
        assert line["thresholds"] == best_thresholds(trained["curve"][-1]["f1_by_threshold"])
        (photograph,) = line["test"]["tuned"]["photographs"]
        assert photograph["name"] == "eye"
        assert photograph["tp"] + photograph["fn"] == 200


def test_folders_that_are_not_there_are_said(folder, capsys):
    arguments = ["--question", "a", "--output", folder / "external.jsonl", "--images", folder / "no", "--masks", folder]
    assert external.main(list(map(str, arguments))) == 2
    assert capsys.readouterr().err.startswith("external.py: error: ")


def test_a_question_may_be_about_another_data_set(folder, monkeypatch):
    arms = {name: dataclasses.replace(settings, data="tiles") for name, settings in ARMS.items()}
    monkeypatch.setitem(QUESTIONS, "a", Question(arms, range(2), tested=True))
    write_tiles(folder / "data")
    for line in run(folder, "--question", "a", "--seeds", "1"):
        assert line["settings"]["data"] == "tiles"
        assert [photograph["name"] for photograph in line["test"]["photographs"]] == 2 * ["exp1_num_3", "exp1_num_7"]


def test_lines_older_than_a_setting_count_as_runs_with_its_default(folder):
    lines = run(folder, "--question", "d", "--seeds", "1")
    del lines[0]["settings"]["data"]
    assert runs_of("bce", QUESTIONS["d"], lines) == lines[:1]
