"""The overhead benchmark measures like against like, and goes from the command line to its figures."""

import collections
import json
import math
from pathlib import Path

import pytest
import reference
import run
import torch
from batches import assert_equal_values_and_gradients
from overhead import alternatives, plan, sections
from overhead.tables import markdown
from overhead.workloads import drawn_batch, pixels_as_patches
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_exudate_loss import CombinedExudateLoss, PatchDensityContrastLoss, PatchEdgeContrastLoss

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
RECORDED, RECORDED_ON_CUDA = (
    json.loads((ROOT / f"benchmarks/results/run-{device}.json").read_text()) for device in ("cpu", "cuda")
)


@pytest.fixture
def tiny(monkeypatch):
    """Sizes at which the whole program takes seconds."""

    def small(device, seed):
        return plan.full(device, seed)._replace(
            budget=0.0,
            image=(32, 32),
            channels=4,
            loop_side=20,
            encoders=("resnet18",),
            training=(2, 32),
            settled=1,
            growth={"side": ((16, 16), (40, 24)), "area": (0.0, 0.5, 1.0), "stride": (1, 4), "patch_size": (8,)},
            growth_side=32,
            embeddings=(16, 24),
            compiled=("BCE",),
        )

    monkeypatch.setattr(run, "quick", small)


def test_a_run_gives_tables_plots_and_figures(tiny, tmp_path, capsys):
    output, figures = tmp_path / "plots.png", tmp_path / "figures.json"
    code = run.main(["--quick", "--device", "cpu", "--seed", "3", "--output", str(output), "--json", str(figures)])
    assert code == 0
    measured = json.loads(figures.read_text())
    assert measured["configuration"]["seed"] == 3
    assert measured["environment"]["threads"] == torch.get_num_threads()
    assert list(measured["sections"]) == list(sections.SECTIONS)
    assert markdown(measured) in capsys.readouterr().out
    for rows in measured["sections"].values():
        for row in rows:
            assert 0 < row["seconds"]["lower"] <= row["seconds"]["median"] <= row["seconds"]["upper"]
    overhead = measured["sections"]["overhead"]
    names = {(row["work"], row["mode"], row["precision"]) for row in overhead}
    assert {
        (loss, "eager", p) for loss in ("floor", "BCE", "density", "edge", "combined") for p in sections.PRECISIONS
    } <= names
    assert ("BCE", "compiled", "float32") in names
    with Image.open(output) as plots:
        assert len(plots.convert("L").resize((100, 50)).getcolors()) > 10


def test_a_loss_that_does_not_compile_is_reported(tiny, monkeypatch):
    def refuse(criterion, fullgraph):
        def compiled(*inputs):
            raise torch._dynamo.exc.TorchDynamoException("no compiler here")

        return compiled

    monkeypatch.setattr(torch, "compile", refuse)
    rows = sections.overhead(run.quick(CPU, 0), print)
    failed = [row for row in rows if "failure" in row]
    assert [(row["work"], row["mode"], row["precision"]) for row in failed] == [
        ("BCE", "compiled", precision) for precision in sections.PRECISIONS
    ]
    assert all("no compiler here" in row["failure"] for row in failed)


@pytest.mark.parametrize("area", [None, 0.0, 0.02, 0.3, 1.0])
def test_plain_operations_give_the_same_terms(area):
    _, target, features = drawn_batch((64, 48), CPU, channels=5, area=area, dtype=torch.float64)
    for plain, ours in zip(
        alternatives.plain_terms(features, target), (PatchDensityContrastLoss(), PatchEdgeContrastLoss()), strict=True
    ):
        assert_equal_values_and_gradients(plain, ours(features, target), features)


@pytest.mark.parametrize("count", [16, 24, 7])
def test_every_way_contrasts_the_same_embeddings(count):
    _, target, features = pixels_as_patches(count, 4, 0.3, CPU)
    ours = PatchDensityContrastLoss(1)(features, target)
    for way in (sections._plain_on_pixels, sections._library_on_pixels):
        torch.testing.assert_close(way(features, target), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [20, 45, 60])
def test_hecl_is_compared_with_the_loop_that_it_equals(side):
    for seed in range(4):
        batch = drawn_batch((side, side), CPU, area=(0.02, 0.2, 0.5, 0.9)[seed], dtype=torch.float64, seed=seed)
        batch = batch._replace(target=batch.target.double())
        ours = CombinedExudateLoss.hecl()(*batch)
        assert_equal_values_and_gradients(sections._published(*batch), ours, batch.logits, batch.features)


@pytest.mark.parametrize("area", [0.0, 0.05, 0.5, 1.0])
def test_bands_are_counted_as_the_loops_find_them(area):
    target = drawn_batch((40, 50), CPU, images=2, area=area).target
    found = [band for image in target for bands in reference.bands(image[0]) for band in bands]
    assert alternatives.band_count(target) == sum(bool(band) for band in found)


class Called(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names[function.__name__.split(".")[0]] += 1
        return function(*arguments, **keywords or {})


def test_floor_reads_writes_and_contrasts_what_it_says():
    features = torch.randn(2, 3, 8, 8)
    work = alternatives.floor(lambda: "done", features, [5, 7])
    with Called() as called:
        cross_entropy, total, written = work()
    assert [called.names[name] for name in ("sum", "ones_like", "mm", "exp_")] == [1, 1, 4, 2]
    assert cross_entropy == "done"
    torch.testing.assert_close(total, features.sum())
    assert written.shape == features.shape


@pytest.mark.parametrize("area", [0.0, 0.01, 0.37, 1.0])
def test_drawn_lesions_cover_the_area_asked_for(area):
    target = drawn_batch((70, 50), CPU, images=3, area=area).target
    assert set(target.unique().tolist()) <= {0, 1}
    assert target.sum() == round(area * 3 * 70 * 50)


def test_a_drawn_batch_has_the_shapes_asked_for_and_is_its_seeds():
    def draw(seed):
        return drawn_batch((64, 32), CPU, images=2, channels=3, stride=4, dtype=torch.bfloat16, seed=seed)

    batch = draw(1)
    assert (batch.logits.shape, batch.target.shape) == ((2, 1, 64, 32),) * 2
    assert batch.features.shape == (2, 3, 16, 8)
    assert batch.features.dtype == batch.logits.dtype == torch.bfloat16
    for tensor, same, other in zip(batch, draw(1), draw(2), strict=True):
        assert torch.equal(tensor, same)
        assert not torch.equal(tensor, other)


@pytest.mark.parametrize("count", [16, 47704, 13])
def test_pixels_as_patches_are_as_many_as_asked_for(count):
    assert pixels_as_patches(count, 2, 0.1, CPU).target.numel() == count


def test_memory_is_foreseen_on_the_power_law():
    cubes = [(n, 5 * n**3) for n in (10, 20)]
    assert sections._foreseen(cubes, 40) == pytest.approx(5 * 40**3)
    assert sections._foreseen(cubes[:1], 40) == 0


def test_the_contrast_stops_where_memory_would_not_suffice(monkeypatch):
    monkeypatch.setattr(sections, "free_memory", lambda device: 4e6)
    small_plan = plan.full(CPU, 0)._replace(embeddings=(16, 32, 64, 128), budget=0.0)
    rows = [row for row in sections.contrast(small_plan, print) if row["work"] == "pytorch-metric-learning"]
    assert [row["embeddings"] for row in rows] == [16, 32, 64]
    assert rows[-1]["needed_bytes"] > 1e6
    assert not math.isnan(rows[0]["seconds"]["median"])


@pytest.mark.parametrize(("page", "figures"), [("performance", RECORDED), ("performance-cuda", RECORDED_ON_CUDA)])
def test_the_performance_pages_hold_the_recorded_tables(page, figures):
    assert markdown(figures) in (ROOT / f"docs/{page}.md").read_text()


def recorded(section, figures=RECORDED, **wanted):
    return next(row for row in figures["sections"][section] if wanted.items() <= row.items())


def test_readme_shows_the_recorded_cost():
    step = recorded("training_step", model="Unet, resnet18", work="combined alone")
    on_cuda = recorded("training_step", RECORDED_ON_CUDA, model="Unet, resnet18", work="combined alone")
    loop = recorded("otherwise", work="the same, patch by patch in Python")
    readme = (ROOT / "README.md").read_text()
    for shown in (
        f"{100 * step['share_of_step']['median']:.1f} % of a training step",
        f"{loop['to_ours']['median']:.0f} times as fast as the published code's patch-by-patch loop",
        f"{100 * on_cuda['share_of_step']['median']:.0f} % of that step",
    ):
        assert shown in readme


def test_a_tap_keeps_the_features_of_the_last_pass(tiny):
    for _ in range(2):  # the second time a profile has seen the features of the first
        without, with_tap = (row["kept_bytes"] for row in sections.inference(run.quick(CPU, 0), print))
        assert with_tap == without + 4 * 2 * 16 * 32 * 32


def test_one_section_can_be_measured_alone(tiny, tmp_path):
    figures = tmp_path / "figures.json"
    arguments = ["--quick", "--device", "cpu", "--only", "pull", "--output", str(tmp_path / "plots.png")]
    assert run.main([*arguments, "--json", str(figures)]) == 0
    ((name, rows),) = json.loads(figures.read_text())["sections"].items()
    assert name == "pull"
    assert ["added_to_step" in row for row in rows] == [False, True, False, True]
    assert not (tmp_path / "plots.png").exists()
