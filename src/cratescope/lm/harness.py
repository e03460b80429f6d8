"""Tasks of lm-eval (EleutherAI's language model evaluation harness), its own or local YAML ones, on our models."""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cratescope.errors import UserError, as_user_error


def identity(folder: Path | None) -> str | None:
    """SHA-256 of a task folder's content, because names alone do not identify local tasks."""
    if folder is None:
        return None
    if not folder.is_dir():
        raise UserError(f"--task-folder {folder}: no such folder; give one with YAML files of tasks")
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def open_tasks(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's TaskManager, which knows every task of `names`.

    Raises UserError: lm-eval is not installed, or has no task, group or tag of that name.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError("--tasks needs lm-eval: pip install 'cratescope[eval]'") from error
    if folder:
        # Without the thousands of YAML files of lm-eval's own tasks, which take half a minute to read.
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            fix = f"a YAML file of {folder}" if folder else "`lm-eval ls tasks`, or give --task-folder"
            raise UserError(f"--tasks {name}: lm-eval has no such task; see {fix}")
    return manager


def run_tasks(
    manager: Any,
    names: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    context: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run tasks one by one, yielding each name with lm-eval's metrics, standard errors, versions and sample counts.

    Raises UserError where the data of a task is not available.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=context)
    for name in names:
        fix = "a YAML file of --task-folder can name local files"
        with as_user_error(f"--tasks {name}: its data cannot be read", fix):
            manager.load([name])
        with contextlib.redirect_stdout(sys.stderr):  # it prints progress, and stdout is for results
            found = lm_eval.simple_evaluate(wrapped, tasks=[name], task_manager=manager, log_samples=False)
        result = {
            "lm_eval": lm_eval.__version__,
            "task_versions": found["versions"],
            "n_samples": {task: count["effective"] for task, count in found["n-samples"].items()},
            "results": {task: metrics(row) for task, row in found["results"].items()},
        }
        yield name, result


def metrics(row: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's `acc,none` and `acc_stderr,none` as one entry, `acc`; other filters stay in the name."""
    found = {}
    for key, value in row.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr"):
            label = name if kind == "none" else key
            found[label] = {"value": _number(value), "standard_error": _number(row.get(f"{name}_stderr,{kind}"))}
    return found


def _number(value: Any) -> float | None:
    """A finite number or None; lm-eval writes N/A where it has no standard error."""
    return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else None
