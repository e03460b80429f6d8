"""The house: imports point one way, and the command line starts at once."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "cratescope"
# Low to high: a module may import from its own rank and from those before it.
RANKS = (
    ("run", "options", "config", "hardware", "arm", "parts"),
    ("models",),
    ("lm",),
    ("neurons",),
    ("results",),
    ("report",),
    ("stages",),
    ("study",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}


# The public API: a run gives its model and its neurons, a neuron shows itself. Inside functions only.
UPWARDS = {
    "run.py": ("lm", "models", "results"),
    "results/neuron.py": ("report",),
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{alias.name}" if node.module == "cratescope" else node.module for alias in node.names
            ]
        yield from (name.split(".")[1] for name in names if name.startswith("cratescope."))


def test_imports_point_one_way():
    wrong = [
        f"{path.relative_to(SOURCE)} imports {name}"
        for path in SOURCE.rglob("*.py")
        if (place := path.relative_to(SOURCE).parts[0].removesuffix(".py")) in RANK
        for name in imported(path)
        if RANK[name] > RANK[place] and name not in UPWARDS.get(path.relative_to(SOURCE).as_posix(), ())
    ]
    assert not wrong


@pytest.mark.parametrize("module", ["cratescope", "cratescope.run"])
def test_a_run_imports_what_is_above_it_only_when_asked(module):
    code = f"import sys, {module}; print([m for m in sys.modules if m.startswith('cratescope.') and m != '{module}'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_module_has_a_rank_and_a_docstring():
    for path in SOURCE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
        assert path.name == "__init__.py" or path.relative_to(SOURCE).parts[0].removesuffix(".py") in RANK, path


def test_help_loads_nothing_heavy():
    heavy = "('torch', 'transformers', 'numpy', 'pyarrow')"
    code = f"import sys, cratescope.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_every_relative_link_of_the_docs_leads_somewhere():
    root = SOURCE.parent.parent
    for page in (*root.glob("*.md"), *root.glob("docs/*.md")):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
