"""Mutation testing: which small changes of the package do the tests not notice?

    python tests/mutants.py FOLDER [MODULE ...]

makes the mutants of cosmic-ray of each module in FOLDER/MODULE, in a copy of package and tests, runs the module's tests
on each, prints the survivors and what share was killed, and goes on from there when called again.
Torch and the like are imported once: each mutant gets a fork of this process, which imports the package anew.
"""

import argparse
import ast
import contextlib
import gc
import importlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from cosmic_ray import mutating, plugins
from cosmic_ray.commands import init
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult
from hypothesis import Phase, settings
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
LOSSES = ["test_combined.py", "test_hecl.py", "test_modules.py", "test_losses.py", "test_degenerate.py"]
# The tests of each module, the quickest first: together under 20 seconds.
TESTS = {
    "_checks": ["test_checks.py", "test_losses.py"],
    "contrast": ["test_contrast.py"],
    "distributed": ["test_distributed.py"],
    "features": ["test_features.py"],
    "losses": ["test_checks.py", *LOSSES, "test_devices.py"],
    "morphology": ["test_morphology.py"],
    "patches": ["test_patches.py", "test_losses.py", "test_hecl.py"],
    "pooling": ["test_pooling.py", "test_losses.py"],
}
SLOW = (
    "training_an_smp",  # of test_features
    "compile",  # of test_devices and test_distributed
    "another_supervised_loss",  # of test_combined
)
EXAMPLES = 15  # that hypothesis draws for a law
# Lines that only a CUDA or MPS device can tell from their mutants.
OTHER_DEVICES = ("torch.cuda.is_current_stream_capturing", "self._values_checked", '"mps"')
# What the tests import, the package and the tests themselves excepted.
IMPORTED = (
    "hypothesis",
    "hypothesis.strategies",
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
    options = parser.parse_args()
    sys.dont_write_bytecode = True  # two mutants may be of one second and of one size
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # no fork has to copy what none will free
    for module in options.modules or TESTS:
        survivors = test_of(module, options.folder.resolve() / module)
        for survivor in sorted(survivors):
            print(survivor)


def test_of(module: str, folder: Path) -> list[str]:
    """The diffs of the survivors, after a line of figures on the screen."""
    started = not folder.exists()
    if started:
        for name in ("contrastive_exudate_loss", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
    os.chdir(folder)
    path = Path("contrastive_exudate_loss", f"{module}.py")
    shutil.copy(ROOT / path, path)  # or what an interrupted run has left
    begin = time.perf_counter()
    if passed(TESTS[module], timeout=120) is not True:
        sys.exit(f"the tests of {module} fail without a mutation")
    seconds = time.perf_counter() - begin
    with use_db("session.sqlite", WorkDB.Mode.create) as database:
        if started:
            init([path], database, {})
            leave_out(database, path)
        for item in tqdm(database.pending_work_items, desc=f"{module}, {seconds:.1f} s a run", mininterval=10):
            database.set_result(item.job_id, result_of(item, TESTS[module], timeout=5 + 3 * seconds))
        results = [result for _, result in database.results if result.worker_outcome != WorkerOutcome.SKIPPED]
    survivors = [result.diff for result in results if not result.is_killed]
    share = 1 - len(survivors) / max(1, len(results))
    print(f"{module}: {len(results)} mutants, {len(survivors)} survive, {share:.1%} killed, {seconds:.1f} s a run")
    return survivors


def leave_out(database: WorkDB, path: Path) -> None:
    """Skip what no test on a CPU can tell: annotations, and lines of other devices."""
    text = path.read_text()
    annotations = [
        part
        for node in ast.walk(ast.parse(text))
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if isinstance(part, ast.expr)
    ]
    lines = text.splitlines()
    for item in database.pending_work_items:
        at = item.mutations[0].start_pos
        row = at[0]
        annotated = any((a.lineno, a.col_offset) <= at < (a.end_lineno, a.end_col_offset) for a in annotations)
        if annotated or any(words in lines[row - 1] for words in OTHER_DEVICES):
            database.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))


def result_of(item: WorkItem, tests: list[str], timeout: float) -> WorkResult:
    """Whether the tests notice a mutation."""
    (mutation,) = item.mutations
    operator = plugins.get_operator(mutation.operator_name)(**mutation.operator_args)
    with mutating.use_mutation(mutation.module_path, operator, mutation.occurrence) as (before, after):
        outcome = TestOutcome.SURVIVED if passed(tests, timeout) else TestOutcome.KILLED
    changed = [
        f"{mutation.module_path.name}:{row} {mutation.operator_name}: {old.strip()}  ->  {new.strip()}"
        for row, (old, new) in enumerate(zip(before.splitlines(), after.splitlines(), strict=False), 1)
        if old != new
    ]
    return WorkResult(WorkerOutcome.NORMAL, test_outcome=outcome, diff="\n".join(changed[:1]))


def passed(tests: list[str], timeout: float) -> bool:
    """Whether these tests pass, in a fork of this process; not in time means no."""
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 3
        with contextlib.suppress(BaseException):
            sys.path.insert(0, os.getcwd())
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            files = [f"tests/{name}" for name in tests]
            default = settings.get_profile("default")
            phases = (Phase.explicit, Phase.generate)  # a mutant that is noticed needs no smallest example
            settings.register_profile("mutants", default, max_examples=EXAMPLES, phases=phases)
            skipped = " or ".join(f"({words})" for words in SLOW)
            options = [
                "-xq",
                "--assert=plain",
                "-p",
                "no:cacheprovider",
                "--hypothesis-profile",
                "mutants",
                "-k",
                f"not ({skipped})",
            ]
            code = pytest.main([*options, *files])
        os._exit(code)
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


if __name__ == "__main__":
    main()
