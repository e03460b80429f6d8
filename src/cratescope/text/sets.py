"""Documents to evaluate on: any text file, or a hub data set the paper used, from the hub or from a local copy."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from cratescope.errors import UserError, as_user_error
from cratescope.files import SURROGATES, sha256
from cratescope.progress import say
from cratescope.text.sources import as_document, name_some, open_sources


@dataclass(frozen=True)
class HubSet:
    """A hub data set: its location, the split to read, and what counts as a document."""

    path: str
    config: str | None
    split: str
    column: str
    rows: int = 1
    """Rows, joined by line breaks, that make a document."""
    last_word: bool = False
    """Whether the last word of a document is what is asked for."""
    data_files: str | None = None
    """Files to read instead of those the data set names itself."""


SETS = {
    # The copyright-free Pile is what the paper trained on; its test split is in none of the splits of `prepare`.
    "pile": HubSet("monology/pile-uncopyrighted", None, "test", "text"),
    # It has one split only, of which the first documents are read; a Pile model has not been trained on it.
    "openwebtext": HubSet("Skylion007/openwebtext", None, "train", "text"),
    # OpenAI's text with case and punctuation, on which GPT-2 and lm-eval report; the original is lower-cased tokens.
    "lambada": HubSet("EleutherAI/lambada_openai", "default", "test", "text", last_word=True),
    # A row is an article; in Salesforce/wikitext it is a line. The test split of WikiText-2 is that of WikiText-103.
    "wikitext": HubSet("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test", "page"),
    # Sentences without the borders of their articles (about 20 each); the original is a script, this its Parquet copy.
    "ptb": HubSet(
        *("parquet", None, "test", "sentence"),
        rows=20,
        data_files="hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/test/0000.parquet",
    ),
}
BUILDERS = {".jsonl": "json", ".jsonl.zst": "json", ".jsonl.gz": "json", ".parquet": "parquet"}


def find_set(name: str) -> HubSet | Path:
    """Look up `name`: a set of SETS, a local copy of one (`lambada=FILE`), or a file or folder of text.

    Raises:
        UserError: there is nothing of that name, or a local copy is of no known format.
    """
    if name in SETS:
        return SETS[name]
    known, _, file = name.partition("=")
    if file and known in SETS:
        return _local_copy(SETS[known], Path(os.path.expanduser(file)))
    path = Path(os.path.expanduser(name))
    if not path.exists():
        known = ", ".join(("validation", "heldout", *SETS))
        raise UserError(f"--on {name}: no such file, and no set of that name; there are {known}")
    return path


def _local_copy(entry: HubSet, file: Path) -> HubSet:
    if not file.is_file():
        raise UserError(f"{file}: no such file; give a copy of the data set {entry.path}")
    builder = next((name for suffix, name in BUILDERS.items() if file.name.lower().endswith(suffix)), None)
    if builder is None:
        raise UserError(f"{file}: unknown kind of file; a copy of a hub data set is {', '.join(BUILDERS)}")
    return dataclasses.replace(entry, path=builder, config=None, data_files=str(file.resolve()))


def identity(found: HubSet | Path) -> dict[str, Any]:
    """Identity that a result on the set depends on: the entry, and the content of local files."""
    if isinstance(found, HubSet):
        files = found.data_files
        local = {"sha256": sha256(Path(files))} if files and Path(files).is_file() else {}
        return dataclasses.asdict(found) | {"data_files": Path(files).name if local and files else files} | local
    return {"sha256": [source.sha256() for source in open_sources(str(found.resolve()))[1]]}


def read(name: str, found: HubSet | Path, limit: int) -> list[str]:
    """Read the first `limit` non-empty documents as valid Unicode; anything else becomes `?`, with a warning.

    Not U+FFFD, as in `prepare`: bits per byte count the file's bytes, and one `?` stands for one byte.
    Raises UserError for a set that cannot be read, has no such column, or has no text.
    """
    if isinstance(found, HubSet):
        documents = _hub_documents(name, found)
    else:
        _, sources, left_out = open_sources(str(found.resolve()))
        if left_out:
            say(f"{found}: {name_some(left_out)}")
        documents = (text for source in sources for text in source.documents())
    texts = list(islice((text for text in documents if text.strip()), limit))
    if not texts:
        raise UserError(f"--on {name}: has no text; give a file or set with text")
    if invalid := sum(1 for text in texts if SURROGATES.search(text)):
        say(f"warning: --on {name}: {invalid} documents had invalid UTF-8, now `?`")
    return [SURROGATES.sub("?", text) for text in texts]


def _hub_documents(name: str, entry: HubSet) -> Iterator[str]:
    """Stream the documents of a set, downloading no more than is read."""
    rows = (_text(name, entry, row) for row in _hub_rows(name, entry))
    while block := list(islice(rows, entry.rows)):
        yield "\n".join(block)


def _text(name: str, entry: HubSet, row: dict[str, Any]) -> str:
    text = as_document(row[entry.column]) if entry.column in row else None
    if text is None:
        raise UserError(f"--on {name}: no column `{entry.column}` of strings, only {', '.join(row)}; rename one")
    return text


def _hub_rows(name: str, entry: HubSet) -> Iterator[dict[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"--on {name}: reading it needs pip install 'cratescope[hub]'") from error
    datasets.disable_progress_bars()
    files = {entry.split: entry.data_files} if entry.data_files else None
    what = entry.data_files or f"{entry.path} of the hub"
    fix = f"give a local copy, such as --on {name.partition('=')[0]}=FILE.jsonl"
    with as_user_error(f"--on {name}: {what} cannot be read", fix):
        yield from datasets.load_dataset(entry.path, entry.config, data_files=files, split=entry.split, streaming=True)
