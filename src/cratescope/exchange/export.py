"""Neuron records in the formats of other tools; the module of a format has its name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from cratescope.errors import UserError
from cratescope.exchange.config import ExportConfig
from cratescope.neurons.sample import find_site, record_files, records_identity
from cratescope.run import Run


def export(config: ExportConfig) -> Path:
    """Write the records of a run in another tool's format and return `config.out`; finished files are kept.

    Raises:
        UserError: no such records, `config.out` holds something else, or (delphi) there is no dump or other data.
    """
    run = Run(config.run)
    if any((config.out / name).exists() for name in ("run.json", "records")):
        raise UserError(f"--out {config.out}: is a run directory; give a folder of its own")
    site = find_site(run, config.site)
    files = record_files(run.records(site), config.layers)
    identity = {"format": config.format} | records_identity(run, site)
    import_module(f"cratescope.exchange.{config.format}").write(config, run, files, identity)
    return config.out
