"""What the page opens with: the runs beside each other, what they are and how well their units are explained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cratescope.errors import UserError
from cratescope.files import read_json
from cratescope.results.estimates import of_layer
from cratescope.viewer.opened import Measure, Opened, OpenedSite
from cratescope.viewer.table import keys, title
from cratescope.viewer.values import finite, number

SETTINGS = ("steps", "batch_tokens", "learning_rate", "budget", "sampling")
"""Settings of a training that are shown."""


def run_entry(opened: Opened) -> dict[str, Any]:
    """A run as the home page shows it."""
    manifest, arm = opened.manifest, opened.arm
    loss, error = _loss(opened)
    sites = [*_sites(opened)]
    return finite(
        {
            "name": opened.name,
            "title": f"{arm.title} {arm.size}" + (", untrained" if arm.untrained else ""),
            "family": arm.family,
            "arm": arm.name,
            "untrained": arm.untrained,
            "parameters": manifest["parameters"],
            "layers": manifest["n_layer"],
            "tokens_trained": arm.tokens_trained,
            "loss": loss,
            "loss_error": error,
            "context": manifest["context"],
            "model": {"kind": arm.family, "sha256": _model_sha256(opened), "can_run": opened.can_run},
            "data": Path(manifest["data"]["path"]).name,
            "made_with": [[key, str(value)] for key, value in _made_with(manifest)],
            "sites": sites,
            "life": [_milestone(one) for one in opened.life],
        }
    )


def _loss(opened: Opened) -> tuple[float | None, float | None]:
    with contextlib.suppress(UserError):
        found = read_json(opened.run.evaluation, {"loss": (float, None)})
        return found["loss"], found.get("standard_error")
    return None, None


def _model_sha256(opened: Opened) -> str | None:
    """Of the weights that the records come from."""
    found = (site.identity.get("model_sha256") for site in opened.sites.values())
    return next((str(one) for one in found if one), None)


def _made_with(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "data", f"{Path(manifest['data']['path']).name} {manifest['data']['manifest_sha256'][:12]}"
    arm = manifest.get("arm") or {}
    if arm.get("seed") is not None:
        yield "seed", arm["seed"]
    settings = manifest.get("settings") or {}
    yield from ((name, settings[name]) for name in SETTINGS if name in settings)
    if "adopted" in manifest:
        yield "adopted", Path(str(manifest["adopted"])).name
    versions = manifest.get("versions") or {}
    yield from ((name, versions[name]) for name in versions if name != "platform")


def _milestone(opened: Opened) -> dict[str, Any]:
    steps = opened.manifest.get("steps")
    tokens = opened.arm.tokens_trained
    return {"step": steps, "tokens": tokens, "run": opened.name if opened.recorded else None}


def _sites(opened: Opened) -> Iterator[dict[str, Any]]:
    """Those whose tables can be read."""
    for name, site in opened.sites.items():
        try:
            yield _site(site)
        except UserError as error:
            opened.problems[name] = str(error)


def _site(site: OpenedSite) -> dict[str, Any]:
    measures = [{"key": f"score{ending}", "title": title(one)} for ending, one in keys(site.measures)]
    return {
        "name": site.name,
        "title": site.name,
        "native": site.native,
        "width": max(site.units(layer).width for layer in site.layers),
        "layers": [_layer(site, layer) for layer in site.layers],
        "measures": measures,
        "has": {
            "explanations": any(any(site.texts(layer)) for layer in site.layers),
            "effects": bool(site.effects.layers),
        },
    }


def _layer(site: OpenedSite, layer: int) -> dict[str, Any]:
    units = site.units(layer)
    density = units.numbers["density"]
    known = density[~np.isnan(density)]
    return {
        "layer": layer,
        "n": len(units),
        "width": units.width,
        "dead": int(units.dead.sum()),
        "median_density": number(float(np.median(known))) if len(known) else None,
        "scores": [_mean(site, measure, layer, f"score{ending}") for ending, measure in keys(site.measures)],
    }


def _mean(site: OpenedSite, measure: Measure, layer: int, key: str) -> dict[str, Any]:
    """The mean score of a layer with its interval over units, and that of another unit's explanation."""
    found = site.scored(measure, layer)
    own, shuffled = (
        of_layer(_there(values), bounds) for values, bounds in ((found.own, True), (found.shuffled, False))
    )
    return {
        "key": key,
        "title": title(measure),
        "n": own.n,
        "mean": number(own.mean),
        "low": number(own.low),
        "high": number(own.high),
        "control": "shuffled" if shuffled.mean is not None else None,
        "control_mean": number(shuffled.mean),
    }


def _there(values: Sequence[float] | np.ndarray) -> dict[int, float]:
    found = np.asarray(values)
    return dict(enumerate(found[~np.isnan(found)].tolist()))
