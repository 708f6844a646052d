"""The file of the study's runs, a line each, and which of its lines answer a question."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trials.objective import Settings
from trials.questions import Question

RESULTS = Path(__file__).parents[1] / "results" / "study.jsonl"


def read_lines(results: Path) -> list[dict[str, Any]]:
    """The runs in the file, none if there is no file."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def runs_of(name: str, question: Question, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those lines that answer the question for one of its arms, one a seed, in the order of the seeds.

    That is with the settings that the arm has now, with seeds that the question asks for, on its device, and after a
    look at the test photographs where they count. Of several lines of a seed the last one stands.
    """
    settings, defaults = (json.loads(json.dumps(dataclasses.asdict(one))) for one in (question.arms[name], Settings()))
    fitting = {
        line["seed"]: line
        for line in lines
        if defaults | line["settings"] == settings  # which lines lack that are older than a setting
        and line["seed"] in question.seeds
        and (line["tested"] or not question.tested)
        # The first lines do not name it.
        and line.get("device", "cpu") == question.device
    }
    return [fitting[seed] for seed in sorted(fitting)]


def file_name(name: str, question: Question, seed: int) -> str:
    """Of what an arm's run leaves beside its line, without a suffix."""
    return f"{name.replace('/', 'by')}, seed {seed}, {question.device}"
