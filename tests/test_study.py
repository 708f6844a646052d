"""The study runs, goes on where it stopped, pairs its arms, and its summary says what its lines say."""

import dataclasses
import fcntl
import json

import pytest
import study
import summary
import torch
from differences import over_photographs, over_seeds
from objective import Settings
from questions import Question
from scipy import stats
from similarity import band_similarity
from test_objective import Network
from test_photographs import write_all
from torch import nn

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

    monkeypatch.setattr(study, "network", network)
    monkeypatch.setattr(study, "NORMS_EVERY", 2)
    monkeypatch.setattr(study, "CURVE_EVERY", 2)
    for letter, tested in (("a", True), ("d", False)):
        monkeypatch.setitem(study.QUESTIONS, letter, Question(ARMS, 2, tested))
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
        assert set(line["curve"][0]) == {"step", *line["test"]} - {"photographs"}
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
    with (claims / "bce, seed 1").open("w") as claim:
        fcntl.flock(claim, fcntl.LOCK_EX)
        lines = run(folder, "--question", "a")
    assert sorted((line["arm"], line["seed"]) for line in lines) == [("bce", 0), ("both", 0), ("both", 1)]
    assert len(run(folder, "--question", "a")) == 4


def test_arms_of_a_seed_are_one_run_where_the_terms_weigh_nothing(folder, monkeypatch):
    light = dataclasses.replace(ARMS["both"], alpha=1e-30, beta=1e-30)
    monkeypatch.setitem(study.QUESTIONS, "a", Question({"bce": TINY, "light": light}, 1, tested=True))
    bce, light = run(folder, "--question", "a")
    assert light["active"]["edge"] > 0
    for name in ("curve", "test"):
        assert bce[name] == light[name]


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


def made_up(arm, seed, scores, tested=True):
    """A line with one score in all metrics, whose photographs have tp of 10 lesion pixels."""
    photographs = [
        {"name": str(i), "lesion": "EX", "tp": tp, "fp": 0, "fn": 10 - tp, "small": 0, "small_found": 0, "edge": 0,
         "edge_near": 0, "predicted_edge": 0, "predicted_edge_near": 0, "disc_fp": 0}
        for i, tp in enumerate(scores)
    ]  # fmt: skip
    f1 = sum(2 * tp / (10 + tp) for tp in scores) / len(scores)
    return {"arm": arm, "seed": seed, "tested": tested, "test": {"f1": f1, "photographs": photographs}}


def test_differences_are_paired_by_seed():
    runs = [made_up("a", seed, [5 + seed, 4]) for seed in (2, 0, 1)]
    others = [made_up("b", seed, [3, 4]) for seed in (0, 1, 2, 3)]
    found = over_seeds(runs, others, "f1")
    pairs = [(run["test"]["f1"], others[run["seed"]]["test"]["f1"]) for run in runs]
    wanted = stats.ttest_rel(*zip(*pairs, strict=True)).confidence_interval(0.95)
    assert found.interval == pytest.approx((wanted.low, wanted.high))
    assert over_photographs(runs, others, "f1").mean == pytest.approx(found.mean)


def test_one_seed_has_no_interval():
    assert over_seeds([made_up("a", 0, [5])], [made_up("b", 0, [3])], "f1").interval is None


def test_the_bootstrap_is_as_wide_as_photographs_differ():
    even = over_photographs([made_up("a", 0, [6] * 20)], [made_up("b", 0, [5] * 20)], "f1")
    uneven = over_photographs([made_up("a", 0, [9] * 10 + [3] * 10)], [made_up("b", 0, [5] * 20)], "f1")
    assert even.interval == pytest.approx((even.mean, even.mean))
    assert uneven.interval[0] < 0 < uneven.interval[1]
    assert uneven.interval[0] < uneven.mean < uneven.interval[1]


def test_a_run_that_looked_at_the_test_photographs_comes_before_one_that_did_not():
    lines = [made_up("a", 1, [1]), made_up("a", 0, [1]), made_up("a", 0, [2], tested=False), made_up("a", 1, [3])]
    assert summary.by_arm(lines) == {"a": [lines[1], lines[3]]}


def test_the_summary_shows_every_run_and_leaves_the_rest_of_the_document(folder, capsys):
    lines = run(folder, "--question", "a")
    arguments = ["--results", str(folder / "study.jsonl")]
    assert summary.main(arguments) == 0
    printed = capsys.readouterr().out
    mean = sum(line["test"]["average_precision"] for line in lines if line["arm"] == "both") / 2
    assert f"| {mean:.3f} ±" in printed
    assert "4 of 4 runs." in printed
    assert "### Question f\n\nNot run." in printed
    document = folder / "results.md"
    document.write_text(f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n")
    assert summary.main([*arguments, "--document", str(document), "--plots", str(folder)]) == 0
    assert document.read_text() == f"before\n{summary.BEGIN}\n\n{printed}\n{summary.END}\nafter\n"
    assert (folder / "study-curves.png").stat().st_size > 5000
    assert (folder / "study-differences.png").stat().st_size > 5000


class Knows(nn.Module):
    """Features that point one way in the lesion and another way outside."""

    def __init__(self, lesion):
        super().__init__()
        self.segmentation_head, self.lesion = nn.Sequential(nn.Conv2d(2, 1, 1)), lesion.float()

    def forward(self, images):
        inside = self.lesion[None, None, : images.shape[2], : images.shape[3]]
        return self.segmentation_head(torch.cat([inside, 1 - inside], 1))


def test_similarity_is_that_of_the_features_inside_and_outside_a_contour(folder):
    samples = study.photographs(folder / "data", "train", 60, folder / "cache60")[:1]
    model = Knows(samples[0].lesion[2])
    found = band_similarity(model, samples, TINY)
    assert found == pytest.approx({"inner": 1, "outer": 1, "across": 0, "norm": 1})
    assert model.training
