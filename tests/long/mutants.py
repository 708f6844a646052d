"""Mutation testing: which small changes of the package do the tests not notice?

    python tests/long/mutants.py FOLDER [MODULE ...] [--most N] [--again]

makes the mutants of cosmic-ray of each module in FOLDER/MODULE, in a copy of package, tests and benchmarks, runs the
module's tests on each, prints the survivors and what share was killed, and goes on from there when called again.
With --most only N mutants of each module are tried, the same random ones each time; a later call may raise N.
With --again the survivors of the last call are tried once more, with the tests as they are now.
Torch and the like are imported once: each mutant gets a fork of this process, which imports the package anew.
"""

import argparse
import ast
import contextlib
import gc
import importlib
import io
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from cosmic_ray import mutating, plugins
from cosmic_ray.commands import init
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult
from hypothesis import HealthCheck, Phase, settings
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
TOGETHER = "test_the_ranks_together_give_the_loss_and_gradients_of_the_whole_batch"
# Of the modules that every call goes through.
WHOLE = [
    "test_checks.py",
    "test_modules.py",
    "test_losses.py",
    "test_degenerate.py",
    "test_combined.py",
    "test_hecl.py",
    "test_features.py",
    "test_devices.py",
    "test_distributed.py::test_on_the_cpu_each_process_contrasts_the_whole",
    f"test_distributed.py::{TOGETHER}[density, the best-(1, 5)]",
    f"test_distributed.py::{TOGETHER}[edge, of images-(3, 3)]",
    "test_distributed.py::test_so_they_do_where_they_share_out_the_anchors_as_on_cuda[nt_xent-density-(1, 5)]",
    "test_distributed.py::test_one_process_gives_the_same_with_a_group_and_without_one",
    "test_distributed.py::test_without_the_option_each_rank_contrasts_its_own[density]",
    "test_distributed.py::test_without_gradients_one_rank_works_alone",
]
# Of the choice of the terms' kernels.
KERNELS = [
    "test_fused.py::test_terms_that_differ",
    "test_fused.py::test_the_same_embeddings_are_drawn",
    "test_fused.py::test_a_value_that_the_target_cannot_hold_is_ignored_nowhere",
    "test_fused.py::test_a_term_alone",
    "test_fused.py::test_logits_of_another_precision_have_a_cross_entropy_of_their_own",
    "test_fused.py::test_weights_that_set_themselves",
    "test_fused.py::test_kernels_equal_the_plain_way",
    "test_fused.py::test_each_call_knows_the_lengths_of_all_processes",
    "test_fused.py::test_a_process_without_kernels_keeps_all_from_using_them",
    "test_fused.py::test_embeddings_of_all_processes_need_offsets_of_32_bits",
]
GATHERED = "test_processes_that_gather_use_one_weight_and_send_what_a_number_sends"
# The tests of each module, the quickest first: together under 20 seconds.
TESTS = {
    "_checks": [
        "test_checks.py",
        "test_labels.py",
        "test_misuse.py",
        "test_losses.py::test_a_value_that_the_dtype_cannot_hold_is_ignored_nowhere",
    ],
    "_misuse": ["test_misuse.py"],
    "_options": ["test_pickles.py", *WHOLE],
    "_supervised": ["test_labels.py", "test_checks.py", "test_losses.py", "test_combined.py", "test_degenerate.py"],
    "_terms": ["test_labels.py", *WHOLE, *KERNELS],
    "_weights": [
        "test_checks.py",
        "test_modules.py",
        "test_pull.py",
        "test_combined.py",
        f"test_pull_processes.py::{GATHERED}[True-static graph]",
    ],
    "contrast": ["test_contrast.py", "test_devices.py::test_the_forward_runs_on_fake_cuda_tensors"],
    "contrast_pairs": ["test_contrast.py"],
    "contrast_rows": ["test_contrast.py"],
    "distributed": ["test_distributed.py"],
    "features": ["test_features.py", "test_checks.py::test_a_bad_tap_is_refused", "test_pull.py"],
    "fused": [
        *(f"test_fused.py::test_kernels_{law}" for law in ("are_off_by_default", "run_on_cuda_alone")),
        "test_fused.py::test_a_switch_turns_kernels_on",
        "test_fused.py::test_kernels_run_where_triton_does",
        *(
            f"test_fused.py::test_kernels_leave_{what}_to_the_plain_way"
            for what in ("compiled_code", "tensor_subclasses")
        ),
        *(f"test_fused.py::test_kernels_want_{what}" for what in ("triton", "tiles_that_fit", "offsets_of_32_bits")),
        "test_fused.py::test_kernels_want_offsets_that_fit",
        "test_fused.py::test_patches_that_fill_the_image_leave_no_rest",
        "test_fused.py::test_kernels_compute_in_32_bits_at_least",
        "test_fused.py::test_a_class_has_an_embedding_of_each_patch_or_image_and_two_of_its_bands",
        "test_fused.py::test_kernels_want_1024_channels_at_most",
    ],
    "graph": ["test_graph.py", "test_features.py", "test_probe.py"],
    "probe": ["test_probe.py"],
    "labels": ["test_labels.py"],
    "losses": [
        "test_labels.py",
        "test_misuse.py",
        "test_pull.py",
        *WHOLE,
        f"test_pull_processes.py::{GATHERED}[False-small buckets]",
        *KERNELS,
    ],
    "masks": ["test_masks.py", "test_morphology.py", "test_losses.py", "test_degenerate.py"],
    "morphology": ["test_morphology.py"],
    "origin": ["test_probe.py", "test_features.py", "test_pull.py"],
    "norms": ["test_norms.py", "test_pull.py"],
    "patches": ["test_patches.py"],
    "pooling": ["test_pooling.py"],
    "pull": ["test_pull.py"],
    "slots": ["test_slots.py", "test_pooling.py"],
}
SLOW = (
    "training_an_smp",  # of test_features
    "compile",  # of test_devices and test_distributed
    "another_supervised_loss",  # of test_combined
    "gradcheck",
    "operators_of_masks",  # of test_masks
    "max_patches_is_uniform",
    "weights_of_one",  # of test_distributed
)
EXAMPLES = 15  # that hypothesis draws for a law
Place = tuple[int, int]  # row and column
# Lines that only a CUDA or MPS device can tell from their mutants.
OTHER_DEVICES = (
    "torch.cuda.is_current_stream_capturing",
    "_values_checked",
    "is not filled_by_mask",
    'state["means"].device != features.device',
    "self.norm.device != given.device",
    '"mps"',
    "_filled_on_cuda(z.device)",
    "TILE_ON_CUDA",
    "filled_by_triton(torch.zeros",
)
# What the tests import, the package and the tests themselves excepted.
IMPORTED = (
    "hypothesis",
    "hypothesis.strategies",
    "lightning",
    "monai.data",
    "monai.losses",
    "pytorch_metric_learning.losses",
    "scipy.ndimage",
    "segmentation_models_pytorch",
    "torch._dynamo",
    "torch.testing",
)


def main() -> None:
    """Read the command line and test each module in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where copies and results are kept")
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(TESTS)}; all if none is named")
    parser.add_argument("--most", type=int, metavar="N", help="mutants to try of each module, drawn at random")
    parser.add_argument("--again", action="store_true", help="try the survivors of the last call once more")
    options = parser.parse_args()
    sys.dont_write_bytecode = True  # two mutants may be of one second and of one size
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", empty])  # imports pytest's own plugins
    gc.freeze()  # no fork has to copy what none will free
    for module in options.modules or TESTS:
        survivors = test_of(module, options.folder.resolve() / module, options.most, options.again)
        for survivor in sorted(survivors):
            print(survivor)


def test_of(module: str, folder: Path, most: int | None, again: bool) -> list[str]:
    """The diffs of the survivors, after a line of figures on the screen."""
    path = Path("contrastive_exudate_loss", f"{module}.py")
    started = not (folder / "session.sqlite").exists()
    if not started and (folder / "origin.py").read_bytes() != (ROOT / path).read_bytes():
        sys.exit(f"{module} has changed since its mutants were made: remove {folder}")
    for name in ("contrastive_exudate_loss", "tests", "benchmarks", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, dirs_exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    shutil.copy(ROOT / path, folder / "origin.py")
    os.chdir(folder)
    begin = time.perf_counter()
    fine, seconds = passed(TESTS[module], cpu=120, limit=600)
    wall = time.perf_counter() - begin
    if not fine:
        sys.exit(f"the tests of {module} fail without a mutation")
    with use_db("session.sqlite", WorkDB.Mode.create) as database:
        if started:
            init([path], database, {})
            leave_out(database, path)
        known = dict(database.results)
        skipped = {job for job, result in known.items() if result.worker_outcome == WorkerOutcome.SKIPPED}
        items = [item for item in database.work_items if item.job_id not in skipped]
        items.sort(key=lambda item: (item.mutations[0].operator_name, item.mutations[0].occurrence))
        random.Random(0).shuffle(items)
        items = items[:most]
        done = {job for job, result in known.items() if result.is_killed or not again}
        for item in tqdm([i for i in items if i.job_id not in done], desc=module, mininterval=10):
            result = result_of(item, TESTS[module], cpu=5 + 3 * seconds, limit=60 + 10 * wall)
            database.set_result(item.job_id, result)
        known = dict(database.results)
        results = [known[item.job_id] for item in items]
    survivors = [result.diff for result in results if not result.is_killed]
    share = 1 - len(survivors) / max(1, len(results))
    counted = f"{len(results)} mutants, {len(survivors)} survive, {share:.1%} killed"
    print(f"{module}: {counted}, {seconds:.1f} s of a CPU a run", flush=True)
    return survivors


def leave_out(database: WorkDB, path: Path) -> None:
    """Skip what no test on a CPU can tell: see the cases."""
    text = path.read_text()
    nodes = list(ast.walk(ast.parse(text)))
    annotations = [
        spanned(part)
        for node in nodes
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if isinstance(part, ast.expr)
    ]
    operators = [(spanned(n.left)[1], spanned(n.right)[0]) for n in nodes if isinstance(n, ast.BinOp)]
    lines = text.splitlines()
    for item in database.pending_work_items:
        (mutation,) = item.mutations
        at, name = mutation.start_pos, mutation.operator_name

        def within(spans: list[tuple[Place, Place]], at: Place = at) -> bool:
            return any(start <= at < end for start, end in spans)

        annotated = within(annotations)
        of_other_devices = any(words in lines[at[0] - 1] for words in OTHER_DEVICES)
        # The star of a signature or a call, which cosmic-ray takes for a product.
        a_star = "ReplaceBinaryOperator" in name and not within(operators)
        # Of small integers, strings, dtypes and None, identity and equality are one in CPython.
        same = name.endswith(("Operator_Eq_Is", "Operator_NotEq_IsNot", "Operator_Is_Eq", "Operator_IsNot_NotEq"))
        # Of bools, all that & and | join in this package, * is & and + is |.
        of_bools = name.endswith(("BitAnd_Mul", "BitOr_Add"))
        # The lengths that zip compares are equal unless another line is wrong.
        lengths = "strict=True" in lines[at[0] - 1] and name.endswith("ReplaceTrueWithFalse")
        # Torch calls the methods of an autograd function on the class, where a static method is a function.
        static = name.endswith("RemoveDecorator") and "@staticmethod" in lines[at[0] - 1]
        # The probe takes places modulo 1, by which cosmic-ray changes numbers.
        whole = lines[at[0] - 1].startswith(("_PLACES = ", "_FURTHER = ")) and name.endswith("NumberReplacer")
        if annotated or of_other_devices or a_star or same or of_bools or lengths or static or whole:
            database.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))


def spanned(node: ast.expr) -> tuple[Place, Place]:
    """Where an expression begins and ends."""
    return (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)


def result_of(item: WorkItem, tests: list[str], cpu: float, limit: float) -> WorkResult:
    """Whether the tests notice a mutation."""
    (mutation,) = item.mutations
    operator = plugins.get_operator(mutation.operator_name)(**mutation.operator_args)
    with mutating.use_mutation(mutation.module_path, operator, mutation.occurrence) as (before, after):
        fine, _ = passed(tests, cpu, limit)
    changed = [
        f"{mutation.module_path.name}:{row} {mutation.operator_name}: {old.strip()}  ->  {new.strip()}"
        for row, (old, new) in enumerate(zip(before.splitlines(), after.splitlines(), strict=False), 1)
        if old != new
    ]
    outcome = TestOutcome.SURVIVED if fine else TestOutcome.KILLED
    return WorkResult(WorkerOutcome.NORMAL, test_outcome=outcome, diff="\n".join(changed[:1]))


def passed(tests: list[str], cpu: float, limit: float) -> tuple[bool, float]:
    """Whether these tests pass, in a fork of this process, and the seconds of a CPU that they took.

    More than cpu of these, or than limit seconds on the clock, means no: others may use the machine too.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(cpu), math.ceil(cpu) + 1))
        code = 3
        with contextlib.suppress(BaseException):
            gc.disable()  # pytest and Python would look through all that is imported, many times
            sys.path.insert(0, os.getcwd())
            start = torch.multiprocessing.start_processes  # from here: a server would import all that is here already
            torch.multiprocessing.start_processes = lambda *a, **k: start(*a, **k | {"start_method": "fork"})
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            files = [f"tests/{name}" for name in tests]
            settings.register_profile(
                "mutants",
                deadline=None,
                derandomize=True,
                max_examples=EXAMPLES,
                phases=(Phase.explicit, Phase.generate),  # a mutant that is noticed needs no smallest example
                suppress_health_check=list(HealthCheck),
            )
            skipped = " or ".join(f"({words})" for words in SLOW)
            options = [
                "-xq",
                "--assert=plain",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:unraisableexception",  # collects garbage
                "--hypothesis-profile",
                "mutants",
                "-k",
                f"not ({skipped})",
            ]
            code = pytest.main([*options, *files])
        os._exit(code)
    until = time.monotonic() + limit
    killed = False
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status == 0 and not killed, usage.ru_utime + usage.ru_stime
        if time.monotonic() > until and not killed:
            os.killpg(child, signal.SIGKILL)
            killed = True
        time.sleep(0.02)


if __name__ == "__main__":
    main()
