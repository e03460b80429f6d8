"""kill -9 in every stage: the same command again ends with the files of an undisturbed run, whenever it was killed.

A stage changes the disk by putting whole files in place and removing others, so a kill between two such changes leaves
what a kill at any time in between would (and a half-written temporary file, which nobody reads). Each stage is killed
right before its first change, its last, and some between; with tables in parts of a few rows, many of these are in
the merging of parts and the replacing of tables. tests/test_study.py kills a whole study, tests/test_trainer.py a
training on several processes, at any time.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from jaxtyping import Float

import processes
from conftest import SMALL_TRAINING
from cratescope import parts
from cratescope.exchange.config import ConvertConfig, ExportConfig, ImportConfig
from cratescope.exchange.export import export
from cratescope.exchange.imports import import_records
from cratescope.exchange.reference import convert
from cratescope.explain.config import ExplainConfig, JudgeConfig, SimulateConfig
from cratescope.explain.explain import explain
from cratescope.explain.judge import judge
from cratescope.explain.simulate import simulate
from cratescope.llm.config import LLMConfig
from cratescope.llm.interface import Choices, Ids, spelled
from cratescope.lm.config import EvaluateConfig, TrainConfig
from cratescope.lm.evaluate import evaluate
from cratescope.lm.train import train
from cratescope.neurons.affect import effects
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig, EffectsConfig
from cratescope.neurons.records import layer_file, read_records, write_records
from cratescope.report.card import neuron_card
from cratescope.report.config import ReportConfig, ShowConfig
from cratescope.report.report import report
from cratescope.sae.config import SaeConfig
from cratescope.sae.train import train_coders
from cratescope.score.config import ScoreConfig
from cratescope.score.score import score
from cratescope.text.config import PrepareConfig
from cratescope.text.prepare import prepare

SMALL = {"excerpts": 40, "context": 24, "window": 8, "top": 12, "random": 12, "part": 16, "tokens": 50}
CODERS = {"tokens": 320, "batch": 32, "buffer": 128, "expansion": 1, "k": 4, "log_every": 2, "save_every": 3}
REFERENCE = Path(__file__).parent / "fixtures" / "reference-crate-2l.pt"
LLM = LLMConfig(llm="scripted", llm_batch=4)
PROTOCOLS = ("uniform",)
NEURONS = 16
KILLS = {"prepare": 3, "train": 2, "evaluate": 2, "collect": 3, "explain": 4, "simulate": 4, "judge": 3}
KILLS |= {"score": 3, "report": 2, "export": 2, "import": 3, "convert": 2, "sae": 4, "effects": 3}
"""Every stage, and the number of moments at which it is killed; the slow test kills it at all of them."""
NEVER = 1_000_000


class Remembers:
    """A model without a memory of its own: the same call has the same answer, in whatever order calls come.

    The id of a piece of text comes from its bytes; a token is likely when the prompt has it.
    """

    name, dtype, vocabulary = "scripted", "float32", 1000

    def encode(self, text: str) -> list[int]:
        return [zlib.crc32(piece.encode()) % self.vocabulary for piece in re.findall(r" ?\w+|\s|[^\w\s]", text)]

    def generate(self, prefix: Ids, prompts: Sequence[Ids], max_new_tokens: int, stop: str) -> list[str]:
        return [f" words like number {sum(ids) % 11}" for ids in prompts]

    def next_logprobs(self, prefix: Ids, prompts: Sequence[Ids]) -> Float[np.ndarray, "n vocab"]:
        logits = np.tile(np.linspace(0, 0.1, self.vocabulary), (len(prompts), 1))
        for row, ids in zip(logits, prompts, strict=True):
            row[list(ids)] += 4
        return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)

    def slot_logprobs(
        self, prefix: Ids, prompts: Sequence[Ids], slots: Sequence[Ids], choices: Choices
    ) -> list[Float[np.ndarray, "slots choices"]]:
        first = [choice[0] for choice in spelled(choices)]
        return [
            self.next_logprobs(prefix, [ids[:slot] for slot in row])[:, first]
            for ids, row in zip(prompts, slots, strict=True)
        ]


def _few(folder: Path) -> None:
    """No stage: keep the records of a few neurons, so that the later stages have little to do."""
    path = layer_file(folder / "run" / "records" / "codes", 0)
    write_records(path, [*read_records(path, range(NEURONS)).values()])


def _explain(folder: Path, worker: str = "auto") -> None:
    explain(ExplainConfig(folder / "run", neurons=NEURONS, protocols=PROTOCOLS, llm=LLM, worker=worker), Remembers())


def _simulate(folder: Path, worker: str = "auto") -> None:
    given = {"explainer": "scripted", "protocols": PROTOCOLS, "llm": LLM, "worker": worker}
    simulate(SimulateConfig(folder / "run", **given), Remembers())


def _judge(folder: Path, worker: str = "auto") -> None:
    given = {"explainer": "scripted", "protocols": PROTOCOLS, "llm": LLM, "worker": worker}
    judge(JudgeConfig(folder / "run", **given), Remembers())


def _convert(folder: Path) -> None:
    """`convert` refuses a folder that is there, so it is only called for one that is not; it has to be whole then."""
    if not (folder / "converted").exists():
        convert(ConvertConfig(REFERENCE, folder / "converted"))


def stages(text: Path) -> dict[str, Callable[[Path], object]]:
    """Every stage, each on what those before it have written to the folder."""
    prepared = {"tokenizer": "bpe:320", "validation": 0.2, "heldout": 0.3, "shard_tokens": 4000}
    training = SMALL_TRAINING | {"milestones": (0.5,)}
    return {
        "prepare": lambda folder: prepare(PrepareConfig(str(text), folder / "data", **prepared)),
        "train": lambda folder: train(TrainConfig(folder / "run", folder / "data", preset="crate-1l", **training)),
        "evaluate": lambda folder: evaluate(EvaluateConfig(folder / "run", crops=4, context=24)),
        "collect": lambda folder: collect(CollectConfig(folder / "run", **SMALL)),
        "few": _few,
        "effects": lambda folder: effects(EffectsConfig(folder / "run", contexts=2, context=8, batch_size=4)),
        "explain": _explain,
        "simulate": _simulate,
        "judge": _judge,
        "score": lambda folder: score(ScoreConfig(folder / "run", explainer="scripted", protocols=PROTOCOLS)),
        "report": lambda folder: report(ReportConfig((folder / "run",), folder / "report", explainer="scripted")),
        "export": lambda folder: export(ExportConfig(folder / "run", folder / "exported")),
        "import": lambda folder: import_records(ImportConfig(folder / "exported", folder / "imported")),
        "convert": _convert,
        "sae": lambda folder: train_coders(SaeConfig(folder / "run", grid=("kind=topk,relu",), **CODERS)),
    }


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Parts of a few rows, of which more than three are merged into one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ROWS", 6)
        patch.setattr(parts, "MOST", 3)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every stage works, disturbed or not: some files hold the path of their folder."""
    return tmp_path_factory.mktemp("kills") / "at" / "folder"


@pytest.fixture(scope="module")
def worked(text_folder: Path, place: Path) -> dict[str, Path]:
    """Copies of the folder before each stage, undisturbed, and after the last."""
    found, copies = {}, place.parents[1] / "copies"
    place.mkdir(parents=True)
    for name, stage in stages(text_folder).items():
        found[name] = shutil.copytree(place, copies / name)
        stage(place)
    found["end"] = shutil.copytree(place, copies / "end")
    return found


def begin(worked: dict[str, Path], name: str, place: Path) -> dict[str, bytes]:
    """Put the folder back to what it was before a stage; return the files as they have to be after it."""
    shutil.rmtree(place)
    shutil.copytree(worked[name], place)
    return files(worked[[*worked][[*worked].index(name) + 1]])


def files(folder: Path) -> dict[str, bytes]:
    """Every file with its bytes, but for what a clock said, locks (empty ones stay), and what the trainer keeps."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            data = re.sub(rb'"(seconds|tokens_per_second|utilisation)": [0-9.e-]+', b"", data)
        if path.name != ".verified.json" and path.suffix != ".lock" and "checkpoint-" not in path.parent.name:
            found[str(path.relative_to(folder))] = data
    return found


@pytest.mark.parametrize("name", KILLS)
def test_a_stage_killed_at_any_change_of_the_disk_ends_with_the_same_files(
    name: str, worked: dict[str, Path], place: Path, text_folder: Path
) -> None:
    kill(name, KILLS[name], worked, place, text_folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_a_stage_killed_at_each_change_of_the_disk_ends_with_the_same_files(
    name: str, worked: dict[str, Path], place: Path, text_folder: Path
) -> None:
    kill(name, NEVER, worked, place, text_folder)


def kill(name: str, times: int, worked: dict[str, Path], place: Path, text: Path) -> None:
    """Kill a stage at so many moments, evenly spread over its changes, and let it finish each time."""
    work = functools.partial(stages(text)[name], place)
    expected = begin(worked, name, place)
    total = processes.killed_before(NEVER, work)
    assert files(place) == expected, "undisturbed, in a process of its own"
    for moment in sorted({round(moment) for moment in np.linspace(0, total - 1, min(times, total))}):
        begin(worked, name, place)
        assert processes.killed_before(moment, work) == moment + 1, "it was killed"
        processes.killed_before(NEVER, work)
        found = files(place)
        assert found.keys() == expected.keys(), f"killed before change {moment} of {total}"
        assert [file for file in found if found[file] != expected[file]] == [], f"killed before change {moment}"


@pytest.mark.parametrize(("name", "stage"), [("explain", _explain), ("simulate", _simulate)])
def test_of_two_workers_one_is_killed_while_it_folds_and_nothing_is_lost(
    name: str, stage: Callable[..., None], worked: dict[str, Path], place: Path
) -> None:
    """Worker 0 dies before each change of its last fold, while worker 1 works; then it is started again."""
    first, second = (functools.partial(stage, place, worker) for worker in ("0/2", "1/2"))
    expected = begin(worked, name, place)
    total = processes.killed_before(NEVER, first)
    for moment in range(total - 6, total, 2):
        begin(worked, name, place)
        other = multiprocessing.get_context("fork").Process(target=second)
        other.start()
        processes.killed_before(moment, first)
        other.join()
        assert other.exitcode == 0
        processes.killed_before(NEVER, first)
        assert files(place) == expected, f"killed before change {moment} of {total}"


def test_show_changes_nothing_on_the_disk(worked: dict[str, Path], place: Path) -> None:
    begin(worked, "report", place)
    assert processes.killed_before(NEVER, lambda: neuron_card(ShowConfig(place / "run", 0, 3))) == 0
    assert files(place) == files(worked["report"])
