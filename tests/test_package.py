"""Laws of the package as a whole: its names, its imports and the examples in its documents."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

import contrastive_exudate_loss as package

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "contrastive_exudate_loss").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# Pages whose examples test_configuration, test_loops, test_nnunet, test_recipe_idrid and test_start run.
OWN_TESTS = {"configuration", "loops", "nnunet", "photographs", "start"}
MIDDLE = {"patches", "morphology", "pooling", "contrast", "distributed", "features", "labels", "pull"}
# Whom each module may import besides the checks; those of the middle do not import each other.
ALLOWED = {
    "contrast": {"contrast_pairs", "contrast_rows", "contrast_triton"},
    "contrast_triton": {"softplus_triton"},
    "features": {"graph", "norms"},
    "origin": {"features", "graph", "probe"},
    "pull": {"graph", "norms", "pull_triton"},
    "pooling": {"slots"},
    "masks": {"patches", "morphology"},
    "pooling_triton": {"softplus_triton"},
    "pairs_triton": {"softplus_triton"},
    "supervised_triton": {"pooling_triton", "softplus_triton"},
    "fused_triton": {"distributed", "fused", "pairs_triton", "pooling_triton", "supervised_triton"},
    "fused": {"contrast", "fused_triton"},
    "_terms": {"_options", "fused", "masks"} | MIDDLE - {"features", "labels", "pull"},
    "_supervised": {"masks"},
    "_weights": {"_options", "distributed", "features", "fused", "graph", "norms", "origin", "pull"},
    "losses": {"_misuse", "_terms", "_supervised", "_weights", "fused", "masks", "origin"} | MIDDLE - {"contrast"},
    "__init__": {"losses", "features", "labels", "pull"},
}


def imports(source):
    """(top-level package, module of this package or None) of each import in a file."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from _split(node.module, [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from _split(alias.name, [])


def _split(module, names):
    top, _, inner = module.partition(".")
    for name in [inner] if inner or top != package.__name__ else names:
        yield top, name


def test_public_names():
    assert sorted(package.__all__) == [
        "CombinedExudateLoss",
        "FeatureTap",
        "LossTerms",
        "PatchDensityContrastLoss",
        "PatchEdgeContrastLoss",
        "Pull",
        "__version__",
        "lesion_masks",
    ]
    for name in package.__all__:
        assert hasattr(package, name)
        assert name == "__version__" or getattr(package, name).__doc__


def test_version_is_that_of_the_distribution_the_changelog_and_the_citation():
    assert importlib.metadata.version("contrastive-exudate-loss") == package.__version__
    assert f"## {package.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {package.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_imports_go_one_way(source):
    ours = {name for top, name in imports(source) if top == package.__name__}
    assert ours <= ALLOWED.get(source.stem, set()) | ({"_checks"} if source.stem != "_checks" else set())


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_torch_is_the_only_dependency(source):
    others = {top for top, _ in imports(source)} - set(sys.stdlib_module_names)
    # Triton comes with PyTorch where there is CUDA, and some files, loaded there alone, are in its language.
    assert others <= {"torch", package.__name__} | ({"triton"} if source.stem.endswith("_triton") else set())


def test_the_distribution_requires_torch_alone():
    required = [line for line in importlib.metadata.requires("contrastive-exudate-loss") if "extra ==" not in line]
    assert [re.match(r"\w+", line).group() for line in required] == ["torch"]


@pytest.mark.parametrize("module", ["numpy", "triton"])
def test_importing_needs_no_numpy_and_no_triton(module):
    code = f"import sys; sys.modules['{module}'] = None; import contrastive_exudate_loss; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


def snippets():
    for document in DOCUMENTS:
        if document.stem in OWN_TESTS:
            continue
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL), 1):
            yield pytest.param(code, id=f"{document.stem}-{number}")


@pytest.mark.parametrize("code", list(snippets()))
def test_examples_in_documents_run(code, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if "init_process_group" in code:
        script = tmp_path / "script.py"
        script.write_text(code)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return
    exec(compile(code, "example", "exec"), {})
    shown = re.findall(r"^# prints (.*)$", code, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == shown


def test_readme_shows_the_drop_in_under_15_lines():
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert "features=model" in example
    assert example.count("\n") < 15


@pytest.mark.parametrize("name", package.__all__)
def test_the_reference_has_every_public_name(name):
    page = (ROOT / "docs/api.md").read_text()
    assert (
        f".. autoclass:: {name}\n" in page
        or f".. autofunction:: {name}\n" in page
        or (name == "__version__" and f"`{name}`" in page)
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_links_within_the_project_lead_somewhere(document):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []
