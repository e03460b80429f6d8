"""The house: imports point one way, and the command line starts at once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "cratescope"
# Rooms from low to high, and the modules of each: a module imports only what stands before it.
HOUSE = {
    "": (
        "errors",
        "stopping",
        "files",
        "locks",
        "workers",
        "hardware",
        "options",
        "progress",
        "arm",
        "zoo",
        "run",
        "parts",
    ),
    "models": ("configuration_crate", "modeling_crate", "__init__", "presets", "cost", "folder", "sae"),
    "text": ("config", "offline", "tokenizer", "sources", "sets", "encoding", "shards", "crops", "prepare"),
    "lm": ("config", "loss", "head", "load", "adopt", "harness", "evaluate", "checkpoints", "trainer", "train"),
    "llm": (
        *("config", "interface", "reasoning", "precision", "prefix", "local"),
        *("cache", "answers", "server", "open"),
    ),
    "neurons": (
        *("config", "records", "kept", "sample", "sites", "coded", "directions", "steer", "spelled", "continuations"),
        *("pushed", "outcomes", "curves", "sweep"),
        *("tensors", "strata", "streaming", "merge", "collect", "effects", "forced", "affect", "written"),
    ),
    "sae": ("config", "loss", "step", "learner", "stream", "foreign", "train", "probing", "quality"),
    "explain": (
        *("config", "protocols", "shown", "phrase", "slots", "openai_wording", "wording", "output_wording"),
        "controls",
        *("explained", "waiting", "simulators.__init__"),
        *(
            f"terms.{name}"
            for name in (
                "__init__",
                "patterns",
                "language",
                "phrases",
                "texts",
                "features",
                "predict",
                "selection",
                "fit",
            )
        ),
        *("terms.explainer", "asking", "selected", "explain"),
        *(f"simulators.{name}" for name in ("readings", "reader", "list_pmi", "list_in_context", "all_at_once")),
        "simulate",
        *(f"judges.{name}" for name in ("__init__", "yes_no", "intruder", "output")),
        "judge",
    ),
    "score": ("config", "words", "weights", "measures", "inference", "sanity", "quality", "scores", "score"),
    "results": ("estimates", "scores", "dictionaries", "runs", "neuron", "compare", "steering", "tables"),
    "report": ("config", "text", "html", "card", "figures", "curves", "frontier", "steering", "verdict", "report"),
    "exchange": ("config", "reference", "imports", "openai", "delphi", "export"),
    "viewer": (
        *("config", "values", "opened", "table", "home", "cards", "data", "search", "notes"),
        *("quiet", "turns", "loaded", "live", "steering", "pairs", "nearest"),
        *("packed", "sizes", "inside", "alike", "export", "guard", "api", "server"),
    ),
    " ": ("config", "stages", "study", "cli", "__main__"),
}
ORDER = {
    ".".join(filter(None, (room.strip(), module))).removesuffix(".__init__"): place
    for place, (room, module) in enumerate((room, module) for room, modules in HOUSE.items() for module in modules)
}
# The public API: a run gives its model and its neurons, a neuron shows itself. Inside functions only.
UPWARDS = {
    "run": ("text.tokenizer", "models.folder", "results.neuron"),
    "results.neuron": ("report.card", "report.html"),
}


def module_of(path):
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """Modules of ours that a file imports, also inside functions; not those that only type checkers read."""
    tree = ast.parse(path.read_text())
    for branch in [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]:
        branch.body = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [part if part.removeprefix("cratescope.") in ORDER else node.module for part in parts]
        yield from (name.removeprefix("cratescope.") for name in names if name.startswith("cratescope."))


def test_imports_point_one_way_between_rooms_and_inside_them():
    wrong = [
        f"{module} imports {name}"
        for path in SOURCE.rglob("*.py")
        if (module := module_of(path)) in ORDER
        for name in imported(path)
        if ORDER[name] >= ORDER[module] and name not in UPWARDS.get(module, ())
    ]
    assert not wrong


@pytest.mark.parametrize("module", ["cratescope", "cratescope.run"])
def test_a_run_imports_what_is_above_it_only_when_asked(module):
    code = f"import sys, {module}; print(*(m for m in sys.modules if m.startswith('cratescope.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert all(ORDER[name.removeprefix("cratescope.")] <= ORDER["run"] for name in loaded)
    assert bool(loaded) == (module != "cratescope")


def test_every_module_has_a_place_and_a_docstring():
    rooms = {*HOUSE, "__init__"}
    for path in SOURCE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
        assert module_of(path) in {*ORDER, *rooms}, path
    assert {module for module in ORDER if module != "models"} <= {module_of(path) for path in SOURCE.rglob("*.py")}


def test_help_loads_nothing_heavy():
    heavy = "('torch', 'transformers', 'numpy', 'pyarrow')"
    code = f"import sys, cratescope.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


HEAVY = ("torch", "transformers.modeling_utils", "scipy", "pandas", "matplotlib", "datasets", "accelerate")
LIGHT = (
    "prepare",
    "explain",
    "simulate",
    "judge",
    "score",
    "terms",
    "show",
    "study",
    "export",
    "import",
    "view",
    "report",
)
"""Stages that begin without torch; those that ask a local LLM load it then."""


def test_stages_without_a_model_begin_with_nothing_heavy():
    code = "import sys; from cratescope import cli; from cratescope.stages import STAGES; cli._set_up_process()\n"
    code += f"for name in {LIGHT}: STAGES[name].load(); print(name, *(m for m in {HEAVY} if m in sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    heavy = {name: loaded for name, *loaded in map(str.split, told.stdout.splitlines())}
    assert heavy == {name: ["matplotlib"] if name == "report" else [] for name in LIGHT}, told.stderr


def test_every_file_and_name_of_ours_in_the_docs_exists():
    root = SOURCE.parent.parent
    for page in (*root.glob("*.md"), *root.glob("docs/*.md")):
        text = page.read_text()
        for name in re.findall(r"[\w/.-]*/[\w-]+\.py\b|\btest_\w+\.py\b", text):
            assert any((folder / name).is_file() for folder in (root, SOURCE, root / "tests")), f"{page.name}: {name}"
        for name, file in re.findall(r"`(\w+)` in `([\w/]+\.py)`", text):
            found = next(folder / file for folder in (root, SOURCE) if (folder / file).is_file())
            assert name in defined(found), f"{page.name}: {name} in {file}"
        for name in re.findall(r"\bcratescope((?:\.[a-z_]\w*)+)", text):
            *rooms, last = name[1:].split(".")
            file = SOURCE.joinpath(*rooms).with_suffix(".py") if rooms else SOURCE / "__init__.py"
            is_module = any(SOURCE.joinpath(*rooms, end).exists() for end in (last, f"{last}.py"))
            assert is_module or (file.exists() and last in defined(file)), f"{page.name}: cratescope{name}"


def defined(path):
    """Names of functions, classes and constants of a file."""
    for node in ast.parse(path.read_text()).body:
        yield from (target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name))
        yield getattr(node, "name", None) or getattr(getattr(node, "target", None), "id", None)


def test_every_relative_link_of_the_docs_leads_somewhere():
    root = SOURCE.parent.parent
    for page in (*root.glob("*.md"), *root.glob("docs/*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
