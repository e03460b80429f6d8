"""The zoo: small trained models that come with the package (zoo/README.md says what they are)."""

from __future__ import annotations

import shutil
from pathlib import Path

from cratescope.arm import Arm
from cratescope.files import Shape, atomic_folder, read_json
from cratescope.options import Checked
from cratescope.progress import STDERR

ZOO = Path(__file__).with_name("zoo")
"""A run directory for each model."""
ENTRY: Shape = {"parameters": int, "n_layer": int, "n_neurons": int}
MEASURED: Shape = {"loss": float, "standard_error": float}
HEADER = ("model", "kind", "layers x neurons", "parameters", "tokens", "validation loss")


def names() -> list[str]:
    return sorted(manifest.parent.name for manifest in ZOO.glob("*/run.json"))


def packaged(name: Path | str) -> Path | None:
    """The package's own folder of the model `zoo/NAME`; None for any other path."""
    path = Path(name)
    return ZOO / path.name if path.parent == Path(ZOO.name) and path.name in names() else None


def bring(root: Path) -> None:
    """Copy the model `zoo/NAME` to the folder `root` of that name, unless there is one; any other path is left alone.

    What is measured on the model is then written there, as in any run, and never into the package. A killed copy
    leaves nothing behind that looks like a run, and of several processes the first to finish wins.
    """
    source = packaged(root)
    if source is None or root.exists():
        return
    with atomic_folder(root, first=True) as folder:
        for file in (path for path in source.rglob("*") if path.is_file()):
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)  # without its mode: a package may be read-only, a run may not
    STDERR.print(f"{root}: copied from cratescope's zoo", markup=False, highlight=False, soft_wrap=True)


def instead(root: Path) -> str:
    """What to do about a folder that is no run."""
    if packaged(root) and root.exists():
        return "move it away, so that the zoo's model can be copied there"
    in_zoo = root.parent == Path(ZOO.name)
    return f"the zoo has {', '.join(names())}" if in_zoo else "make one with `cratescope train`"


def listing(_config: Checked) -> str:
    """A table with a row per model: kind, size, training and the loss on text that it was not trained on."""
    rows = [HEADER, *map(_row, names())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.append("Losses are in nats per token, +- their standard errors.")
    return "\n".join([*lines, "Give one wherever a run is asked for; it is copied to a folder zoo/ here first."])


def _row(name: str) -> tuple[str, ...]:
    found = read_json(ZOO / name / "run.json", ENTRY)
    arm, measured = Arm.of(found), read_json(ZOO / name / "evaluation.json", MEASURED)
    return (
        f"{ZOO.name}/{name}",
        arm.title,
        f"{found['n_layer']} x {found['n_neurons']}",
        f"{found['parameters']:,}",
        f"{(arm.tokens_trained or 0) / 1e6:.1f}M",
        f"{measured['loss']:.3f} +- {measured['standard_error']:.3f}",
    )
