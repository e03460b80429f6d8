"""Records of other tools as a run; the module of a format has its name.

It has `files(source)`: what to read, in order, and by name why other files are left out. And `read(paths, model,
texts)`: each layer with its records, in order of the neurons; `texts` gives their tokens ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cratescope.errors import UserError
from cratescope.exchange.config import ImportConfig
from cratescope.files import SURROGATES, atomic_folder, mark_whole, write_json
from cratescope.locks import locked
from cratescope.neurons.records import NeuronRecord, layer_file, write_records
from cratescope.progress import say
from cratescope.run import Run, claim, made_from, versions
from cratescope.text.sources import name_some
from cratescope.text.tokenizer import EOS

IMPORTED = "imported"
"""Site of imported records: other tools do not say of what their activations are, or call it by names of their own."""


class TokenTexts:
    """Ids for the texts of tokens, one for every different text: the tokenizer they are of may not be here."""

    def __init__(self) -> None:
        self._ids = {EOS: 0}
        self.mended: Counter[Path] = Counter()
        """Tokens of each file that held what has no UTF-8."""

    def id(self, text: str, path: Path) -> int:
        """The id of a token's text in a file; what has no UTF-8 becomes U+FFFD."""
        mended = SURROGATES.sub("\ufffd", text)
        if mended != text:
            self.mended[path] += 1
        return self._ids.setdefault(mended, len(self._ids))

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Build a tokenizer that decodes ids to exactly these texts; it does not encode."""
        tokenizer = Tokenizer(models.WordLevel(self._ids, unk_token=EOS))
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False)


def import_records(config: ImportConfig) -> Path:
    """Write the records of a folder in another tool's format as those of a new run, and return their folder.

    The run gets a tokenizer of its own for their tokens. Tokens that hold what has no UTF-8 get U+FFFD in its place;
    they are counted in the folder's manifest, with a warning.

    Raises:
        UserError: no such files, a file of another format (names the file and the field), or `config.out` is the run
            of a model or holds other records.
    """
    tool = import_module(f"cratescope.exchange.{config.format}")
    run, (paths, left_out) = Run(config.out), tool.files(config.source)
    if run.manifest.exists():
        raise UserError(f"{run.root}: is the run of a model; give --out a folder of its own")
    if left_out:
        say(f"{config.source}: {name_some(left_out)}")
    folder, texts = run.records(IMPORTED), TokenTexts()
    identity = {"imported": config.format, "sha256": made_from(paths, config.source)["files"]}
    with locked(run.root, "import"):
        if folder.exists():
            claim(folder, identity)
        else:
            _write(run, tool.read(paths, run.name, texts), texts, identity)
    if texts.mended:
        found = (
            f"{texts.mended.total()} tokens had invalid UTF-8, now U+FFFD; the first are in {next(iter(texts.mended))}"
        )
        say(f"warning: {config.source}: {found}")
    return folder


def _write(
    run: Run, layers: Iterable[tuple[int, Sequence[NeuronRecord]]], texts: TokenTexts, identity: dict[str, Any]
) -> None:
    with atomic_folder(run.records(IMPORTED)) as folder:
        for layer, records in layers:
            write_records(layer_file(folder, layer), records)
        about = {"identity": identity, "versions": versions(), "invalid_utf8": texts.mended.total()}
        write_json(folder / "manifest.json", about)
        with atomic_folder(run.model) as model:
            texts.tokenizer().save_pretrained(model)
            mark_whole(model)
