"""A stranger's files never run code: what loads models refuses their code, and nothing reads pickles."""

from __future__ import annotations

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest
import torch

import cratescope
from cratescope.errors import UserError
from cratescope.exchange.config import ConvertConfig
from cratescope.exchange.reference import convert, load_checkpoint
from cratescope.files import write_json
from cratescope.lm.config import EvaluateConfig
from cratescope.lm.evaluate import evaluate
from cratescope.models.folder import load_folder
from cratescope.run import Run
from cratescope.text.tokenizer import load_tokenizer

SOURCE = Path(cratescope.__file__).parent
LOADERS = {"from_pretrained", "from_config"}
UNSAFE = {"marshal", "joblib", "dill", "cloudpickle", "shelve", "yaml"}


def calls():
    """(file and line, name of what is called, its keyword arguments) of every call in the package."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), keywords, path


def test_every_model_config_and_tokenizer_is_loaded_without_its_own_code():
    found = 0
    for place, name, keywords, path in calls():
        if name.rpartition(".")[2] in LOADERS:
            found += 1
            # Options that are used for two calls stand in a dictionary above them.
            stated = '"trust_remote_code": False' in path.read_text(encoding="utf-8") and None in keywords
            assert keywords.get("trust_remote_code") == "False" or stated, f"{place}: {name}"
        assert keywords.get("trust_remote_code", "False") == "False", f"{place}: {name}"
    assert found >= 8


def test_nothing_but_tensors_is_read_from_pickles_and_arrays():
    for place, name, keywords, _ in calls():
        if name in ("torch.load", "torch.hub.load"):
            assert keywords.get("weights_only") == "True", place
        if name in ("np.load", "numpy.load"):
            assert keywords.get("allow_pickle") == "False", place
        assert name.partition(".")[0] not in UNSAFE | {"pickle"} or name == "pickle.UnpicklingError", f"{place}: {name}"
        assert name not in ("eval", "exec", "__import__", "pd.read_pickle"), f"{place}: {name}"
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not UNSAFE & {name.partition(".")[0] for name in names}, path


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A model folder whose code leaves a file behind when it runs, and a user who would say yes to anything."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on standard input"))
    folder = tmp_path / "stranger"
    folder.mkdir()
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    code += "from transformers import PretrainedConfig as C, PreTrainedModel as M\n"
    code += "class Config(C):\n    model_type = 'strange'\nclass Model(M):\n    config_class = Config\n"
    (folder / "code.py").write_text(code)
    autos = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", "code.T"]}
    write_json(folder / "config.json", {"model_type": "strange", "auto_map": autos})
    write_json(folder / "tokenizer_config.json", {"auto_map": autos, "tokenizer_class": "T"})
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def test_a_strangers_folder_is_refused_in_one_line_and_none_of_its_code_runs(stranger, tmp_path):
    for load in (load_folder, load_tokenizer, lambda folder: convert(ConvertConfig(folder, tmp_path / "a.pt"))):
        with pytest.raises(UserError) as refused:
            load(stranger)
        assert str(stranger) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_a_run_whose_model_was_replaced_by_a_strangers_is_refused(stranger, runs_folder, tmp_path):
    manifest = json.loads((runs_folder / "crate" / "run.json").read_text())
    manifest["data"]["path"] = str((runs_folder / "crate" / manifest["data"]["path"]).resolve())
    run = Run(tmp_path / "run")
    write_json(run.manifest, manifest)
    stranger.rename(run.model)
    with pytest.raises(UserError, match="cannot be loaded"):
        evaluate(EvaluateConfig(run.root))
    assert not (tmp_path / "ran").exists()


def test_our_own_folder_which_carries_its_code_is_read_by_the_installed_class(runs_folder):
    folder = runs_folder / "crate" / "model"
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    assert type(load_folder(folder)).__module__ == "cratescope.models.modeling_crate"


def test_a_pickle_with_code_in_it_is_refused(tmp_path):
    import pickle

    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"model": Bad(), "model_args": {}}))
    with pytest.raises(UserError, match="refused|not a readable"):
        load_checkpoint(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_a_model_folder_with_a_pickle_is_refused_without_advice_to_run_it(runs_folder, tmp_path):
    source = runs_folder / "crate" / "model"
    shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("model.safetensors", "whole.json"))
    torch.save({"a": Path("x")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match="which could run code and are never loaded") as refused:
        load_folder(tmp_path / "model")
    assert "weights_only" not in str(refused.value)


def test_a_model_that_says_it_has_a_million_layers_is_refused_at_once(runs_folder, tmp_path):
    shape = json.loads((runs_folder / "crate" / "model" / "config.json").read_text())
    write_json(tmp_path / "config.json", {"model_type": "llama", "num_hidden_layers": 10**6, "hidden_size": 32})
    with pytest.raises(UserError, match="num_hidden_layers = 1,000,000"):
        load_folder(tmp_path)
    write_json(tmp_path / "config.json", shape | {"n_layer": 10**6})
    with pytest.raises(UserError, match="num_hidden_layers = 1,000,000"):
        load_folder(tmp_path)
