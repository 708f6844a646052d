"""The main job runs, from the command line to its figures."""

import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from data import idrid
from PIL import Image
from test_idrid import SQUARE, mask_image, write_split
from training import command_line

from contrastive_exudate_loss import CombinedExudateLoss

SMALL = ["--steps", "12", "--batch", "2", "--crop", "64", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch):
    monkeypatch.setattr(train, "TRAINING_IMAGES", 3)
    monkeypatch.setattr(train, "HELD_OUT_IMAGES", 2)
    monkeypatch.setattr(train, "SHARE_STEPS", 4)


def run(folder, *arguments, training=SMALL):
    """The figures of a small run that writes to the folder, and its exit code."""
    code = train.main([*training, "--output", str(folder / "p.png"), "--json", str(folder / "f.json"), *arguments])
    return json.loads((folder / "f.json").read_text()) if code == 0 else None, code


def learnt(figures):
    """What must be the same in a second run."""
    names = ("f1", "iou", "average_precision", "small_recall", "loss_curve")
    return {arm: {name: figures["arms"][arm][name] for name in names} for arm in train.ARMS}


def fake_idrid(folder, lesion="EX"):
    train_masks = [mask_image("P"), mask_image("RGBA"), None]
    write_split(folder, "train", train_masks, lesion)
    write_split(folder, "test", [mask_image("L", np.pad(SQUARE, ((0, 61), (0, 17)))), None], lesion)
    return folder


def test_a_run_gives_table_picture_and_figures(tmp_path, capsys):
    figures, code = run(tmp_path, "--seed", "4")
    assert code == 0
    table = capsys.readouterr().out
    assert "\nDice + BCE + contrast: alpha 0.0, beta Pull(times=2.0, warm_up=0); 12 steps\n" in table
    for row in ("F1", "IoU", "average precision", "small-lesion recall", "seconds per step", "loss's share of a step"):
        assert f"\n{row}" in table
    assert "\npeak memory, MB" in table
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
    assert figures["configuration"]["seed"] == 4
    assert figures["configuration"]["device"] == "cpu"
    assert figures["environment"]["python"] == platform.python_version()
    assert figures["environment"]["torch"] == torch.__version__
    assert figures["environment"]["threads"] == torch.get_num_threads()
    assert figures["environment"]["device"]
    assert figures["training"]["images"] == 3
    assert figures["held_out"]["images"] == 2
    for name in train.ARMS:
        arm = figures["arms"][name]
        assert f"{arm['average_precision']:.3f}" in table
        assert f"{arm['small_recall']:.3f}" in table
        assert f"{arm['step_seconds']['median']:.4f}" in table
        assert 0 < arm["loss_share"] < 1
        assert arm["step_seconds"]["lower"] <= arm["step_seconds"]["median"] <= arm["step_seconds"]["upper"]
        assert [point["step"] for point in arm["loss_curve"]] == [0, 10]


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(tmp_path):
    one, other, third = (learnt(run(tmp_path, "--seed", seed)[0]) for seed in ("1", "1", "2"))
    assert one == other
    assert one != third


def test_the_contrast_changes_nothing_where_it_weighs_nothing(tmp_path):
    figures = learnt(run(tmp_path, "--alpha", "0", "--beta", "0")[0])
    assert figures[train.DICE] == figures[train.CONTRAST]
    assert figures[train.BCE] != figures[train.DICE]


def test_the_weights_change_only_the_training_with_the_contrast(tmp_path):
    default, changed = learnt(run(tmp_path)[0]), learnt(run(tmp_path, "--beta", "1")[0])
    for name in train.ARMS:
        assert (default[name] == changed[name]) == (name != train.CONTRAST)


def test_two_trainings_are_of_dice_and_bce_of_all_pixels():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 6, 5, generator=generator, dtype=torch.float64)
    target = (torch.rand(logits.shape, generator=generator) > 0.7).double()
    found = logits.sigmoid()
    dice = 1 - 2 * (found * target).sum() / (found + target).sum()
    bce = -(target * found.log() + (1 - target) * (1 - found).log()).mean()
    torch.testing.assert_close(train.dice_and_bce(logits, target), dice + bce)
    assert train._contrastive(command_line.parsed([], "")).supervised is train.dice_and_bce


def test_the_criterion_is_made_of_the_loss_options():
    given = command_line.parsed(["--alpha", "0.3", "--beta", "0.7", "--patch-size", "5"], "")
    criterion = train._contrastive(given)
    assert (criterion.alpha, criterion.beta) == (0.3, 0.7)
    assert (criterion.density.patch_size, criterion.edge.patch_size) == (5, 5)


@pytest.mark.parametrize("given", [{}, {"alpha": 0.3}, {"beta": 0.0}])
def test_the_weights_are_those_of_the_constructor_unless_given(given):
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    criterion, expected = train._contrastive(command_line.parsed(arguments, "")), CombinedExudateLoss(**given)
    assert (criterion.alpha, criterion.beta) == (expected.alpha, expected.beta)


def test_the_seed_chooses_the_crops():
    samples = train.fundus_samples(1, 0, stream=0)
    one, other, third = (
        next(train._batches(samples, command_line.parsed(["--seed", seed], ""))) for seed in ("1", "1", "2")
    )
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert not torch.equal(one[0], third[0])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_logits_begin_near_the_lesions_prior(norm):
    model = train._network(0, norm).eval()
    assert float(model(torch.zeros(1, 3, 64, 64)).detach().mean()) == pytest.approx(train.PRIOR_LOGIT, abs=1)


def test_bce_learns_to_find_lesions_in_drawn_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ARMS", (train.BCE,))
    monkeypatch.setattr(train, "TRAINING_IMAGES", 12)
    figures, _ = run(tmp_path, "--steps", "200", "--batch", "4")
    assert figures["arms"]["BCE"]["average_precision"] > 5 * figures["held_out"]["lesion_share"]


def test_a_data_set_is_read_at_the_size_asked_for(tmp_path, capsys):
    figures, _ = run(tmp_path, "--data", str(fake_idrid(tmp_path)), "--size", "40")
    assert "EX masks: 2 of 3 training photographs have one, 1 of 2 held-out photographs" in capsys.readouterr().out
    assert figures["configuration"]["lesion"] == "EX"
    assert figures["training"] == {
        "images": 3,
        "images_with_lesion": 2,
        "lesion_share": pytest.approx(150 / 2400 * 2 / 3),
    }


def test_the_lesion_chooses_the_folder(tmp_path, capsys):
    figures, _ = run(tmp_path, "--data", str(fake_idrid(tmp_path, "SE")), "--lesion", "SE")
    assert "SE masks: 2 of 3" in capsys.readouterr().out
    assert figures["configuration"]["size"] == 512


def test_figures_are_finite_without_held_out_lesions(tmp_path, capsys):
    write_split(tmp_path, "train", [mask_image("P")])
    write_split(tmp_path, "test", [mask_image("L", np.zeros((33, 47), bool))])
    figures, code = run(tmp_path, "--data", str(tmp_path), "--steps", "1")
    assert code == 0
    assert "no held-out image shows a lesion" in capsys.readouterr().out
    for arm in figures["arms"].values():
        assert all(math.isfinite(arm[name]) for name in ("f1", "iou", "average_precision", "small_recall"))
        assert math.isfinite(arm["loss_share"])


def test_a_data_error_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    figures, code = run(tmp_path, "--data", str(tmp_path / "nowhere"))
    assert (figures, code) == (None, 2)
    assert capsys.readouterr().err.count("\n") == 1
    images, _ = write_split(tmp_path, "train", [mask_image("P")])
    write_split(tmp_path, "test", [mask_image("P")])
    (images / "IDRiD_01.jpg").write_bytes(b"no photograph")
    assert run(tmp_path, "--data", str(tmp_path))[1] == 2
    assert "IDRiD_01.jpg' must be a picture file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be an integer >= 1, got '0'"),
        (["--batch", "two"], "--batch: must be an integer >= 1, got 'two'"),
        (["--crop", "60"], "--crop: must be an integer >= 16 and a multiple of 8, got '60'"),
        (["--data", ".", "--size", "8"], "--size: must be an integer >= 32, got '8'"),
        (["--seed", "-1"], "--seed: must be an integer >= 0, got '-1'"),
        (["--seed", "9" * 30], "--seed: must be an integer >= 0"),
        (["--alpha", "nan"], "--alpha: must be a finite number >= 0, got 'nan'"),
        (["--beta", "inf"], "--beta: must be a finite number >= 0, got 'inf'"),
        (["--patch-size", "0"], "--patch-size: must be an integer >= 1, got '0'"),
        (["--device", "abacus"], "--device: must be auto, cpu or"),
        (["--output", "picture.jpg"], "--output: must end in .png, got 'picture.jpg'"),
        (["--output", "absent/picture.png"], "--output: must be a file in a folder that can be written to"),
        (["--json", "."], "--json: must be a file in a folder that can be written to, got '.'"),
        (["--lesion", "EX"], "--lesion is for real photographs only; give their folder with --data"),
        (["--size", "64"], "--size is for real photographs only; give their folder with --data"),
        (["--images", ".", "--masks", "."], "--eval-only, --images and --masks belong together"),
        (["--eval-only", "x", "--masks", "."], "--eval-only, --images and --masks belong together"),
        *(
            (
                ["--eval-only", "x", "--masks", ".", "--images", ".", f"--{name}", value],
                f"--{name} is for training, but --eval-only trains nothing",
            )
            for name, value in (("data", "."), ("lesion", "EX"), ("steps", "9"), ("beta", "0"), ("save", "networks.pt"))
        ),
        (["--data", ".", "--lesion", "OD"], "invalid choice: 'OD'"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_in_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        command_line.parsed(arguments, "")
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_program_runs_from_any_folder(tmp_path):
    program = Path(train.__file__)
    done = subprocess.run([sys.executable, program, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True)
    for option in ("--data", "--lesion", "--json", "--output", "--steps", "--alpha", "--patch-size", "--device"):
        assert option in done.stdout


def test_two_processes_give_the_curve_and_the_terms_of_one(tmp_path):
    fake_idrid(tmp_path)
    program = [
        Path(train.__file__),
        *SMALL,
        "--data",
        tmp_path,
        "--size",
        "48",
        "--norm",
        "group",
        "--alpha",
        "1",
        "--beta",
        "1",
    ]
    curves = []
    for launcher in (
        [sys.executable],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    ):
        paths = ["--output", tmp_path / "p.png", "--json", tmp_path / "f.json"]
        done = subprocess.run([*launcher, *program, *paths], capture_output=True, text=True, timeout=600, check=True)
        assert done.stdout.count("average precision  ") == 1
        figures = json.loads((tmp_path / "f.json").read_text())
        assert figures["environment"]["processes"] == len(curves) + 1
        curves.append([[point["loss"] for point in figures["arms"][arm]["loss_curve"]] for arm in train.ARMS])
        (tmp_path / "f.json").unlink()
    (bce, dice, contrast), (shared_bce, shared_dice, shared_contrast) = curves
    assert len({*bce, *dice, *contrast}) == 6  # steps 0 and 10 of each arm
    assert shared_bce[0] == pytest.approx(bce[0], rel=1e-5)
    assert shared_bce == pytest.approx(bce, rel=0.03)  # Adam's first steps magnify what rounding leaves of nothing
    # Dice is of each process's share, but at the first step, with the same weights, it drops out of the difference.
    assert shared_contrast[0] - shared_dice[0] == pytest.approx(contrast[0] - dice[0], rel=1e-5)


def test_saved_networks_score_the_same_on_the_same_photographs_in_other_folders(tmp_path, capsys):
    fake_idrid(tmp_path)
    figures, _ = run(tmp_path, "--data", str(tmp_path), "--size", "48", "--save", str(tmp_path / "networks.pt"))
    images = tmp_path / idrid.IMAGES / idrid.SPLITS["test"]
    masks = tmp_path / idrid.MASKS / idrid.SPLITS["test"] / idrid.MASKED["EX"]
    folders = ["--images", str(images), "--masks", str(masks)]
    capsys.readouterr()
    found, code = run(tmp_path, "--eval-only", str(tmp_path / "networks.pt"), *folders, "--size", "48", training=())
    assert code == 0
    printed = capsys.readouterr().out
    assert "photographs: 2, with lesion: 1" in printed
    for name in train.ARMS:
        arm, before = found[name], figures["arms"][name]
        got = [arm[key] for key in ("f1_pixels", "iou_pixels", "average_precision", "small_recall")]
        assert got == pytest.approx([before[key] for key in ("f1", "iou", "average_precision", "small_recall")])
        assert f"{arm['average_precision']:.3f}" in printed
    assert found[train.DICE] != found[train.CONTRAST]


def test_a_file_without_networks_is_said_in_one_sentence(tmp_path, capsys):
    fake_idrid(tmp_path)
    torch.save({"model": 1}, tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes(b"torn")
    for name in ("torn.pt", "absent.pt", "other.pt"):
        arguments = "--eval-only", str(tmp_path / name), "--images", ".", "--masks", "."
        assert run(tmp_path, *arguments, training=())[1] == 2
        said = capsys.readouterr().err
        assert said.startswith("train.py: error: --eval-only must be a file that --save has written, but ")
        assert said.count("\n") == 1


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        command_line.parsed(["--batch", "8"], "")
    assert "--batch must be a multiple of the 3 processes, got 8" in capsys.readouterr().err
