"""Models trained elsewhere: what is taken, what is refused in one line, and that a refusal leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from cratescope.errors import UserError
from cratescope.lm.adopt import adopt
from cratescope.models.folder import load_folder
from cratescope.models.presets import build
from cratescope.neurons.collect import collect
from cratescope.neurons.config import CollectConfig
from cratescope.neurons.records import layer_file, read_records
from cratescope.neurons.sites import site_named
from cratescope.neurons.steer import Edit, steered
from cratescope.run import Run
from cratescope.text.shards import TokenData

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
FEW = {"excerpts": 4, "window": 8, "top": 2, "random": 2, "strata": False, "device": "cpu"}

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about its own models


@pytest.fixture
def adopted(data_folder, tmp_path):
    """Collect a model of a configuration; nothing of a refused one may stay."""

    def of(config, change=None, **options):
        model = build(config, 0) if not isinstance(config, torch.nn.Module) else config
        model.save_pretrained(tmp_path / "model")
        TokenData.open(data_folder).tokenizer.save_pretrained(tmp_path / "model")
        if change:
            change(tmp_path / "model")
        settings = FEW | {"context": 16} | options
        try:
            return collect(CollectConfig(tmp_path / "run", model=str(tmp_path / "model"), data=data_folder, **settings))
        except UserError as error:
            assert "\n" not in str(error)
            raise

    return of


def refused(adopted, tmp_path, message, config, change=None, **options):
    with pytest.raises(UserError, match=message):
        adopted(config, change, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=320, hidden_size=16, state_size=4, num_hidden_layers=2),
        BloomConfig(vocab_size=320, hidden_size=16, n_layer=2, n_head=2),
    ],
    ids=["mamba", "bloom"],
)
def test_a_model_that_states_no_longest_context_needs_one_to_be_said(adopted, tmp_path, config):
    refused(adopted, tmp_path, "states no longest context; .*--context", config, context=None, site="residual")
    assert layer_file(adopted(config, site="residual"), 1).exists()


def test_a_context_longer_than_the_models_is_refused_before_anything_is_written(adopted, tmp_path):
    refused(adopted, tmp_path, "longer than the 32 tokens", LlamaConfig(**SHAPE), context=33)


def test_a_context_for_which_the_model_has_no_positions_is_refused(adopted, tmp_path):
    """RoBERTa's first positions are those of padding, so it reads fewer tokens than it states."""
    config = RobertaConfig(**SHAPE, is_decoder=True)
    refused(adopted, tmp_path, "context = 32 is longer than the 30 tokens of this model", config, context=32)
    assert adopted(config, context=30).name == "mlp"


def test_a_wrong_site_of_a_new_model_leaves_nothing(adopted, tmp_path):
    refused(
        adopted,
        tmp_path,
        "no module 'model.layers.0.nonsense'",
        LlamaConfig(**SHAPE),
        site="model.layers.{layer}.nonsense",
    )


def test_a_module_that_sees_batch_and_tokens_as_one_axis_is_read_in_order(adopted, data_folder, tmp_path):
    opt = OPTConfig(
        vocab_size=320,
        hidden_size=16,
        ffn_dim=24,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    folder = adopted(opt, site="model.decoder.layers.{layer}.activation_fn", batch_size=3)
    excerpts = torch.from_numpy(TokenData.open(data_folder).split("heldout").spaced(4, 16).astype("int64"))
    found = []
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    model.model.decoder.layers[1].activation_fn.register_forward_hook(lambda *args: found.append(args[2]))
    with torch.no_grad():
        model(excerpts)
    expected = found[0].view(4, 16, 24)
    for neuron, record in read_records(layer_file(folder, 1)).items():
        for one in record.top + record.random:
            window = expected[one.excerpt, one.start : one.start + 8, neuron]
            assert torch.allclose(window, torch.tensor(one.activations), atol=1e-6)


def test_the_router_of_a_mixture_of_experts_is_read_and_what_sees_a_part_of_the_tokens_is_not(adopted, tmp_path):
    config = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    site = "model.layers.{layer}.mlp.experts.act_fn"
    refused(adopted, tmp_path, r"site .*act_fn (has a|is \d times read)", config, site=site)
    records = read_records(layer_file(adopted(config, site="model.layers.{layer}.mlp.gate"), 0))
    assert len(records) == 4  # one an expert


def test_neurons_of_experts_are_zero_for_tokens_that_go_elsewhere(adopted, data_folder, tmp_path):
    config = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1)
    folder = adopted(config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    experts, seen = model.model.layers[1].mlp.experts, []
    experts.register_forward_pre_hook(lambda _module, given: seen.append(given))
    excerpts = torch.from_numpy(TokenData.open(data_folder).split("heldout").spaced(4, 16).astype("int64"))
    with torch.no_grad():
        model(excerpts)
    tokens, chosen, _ = seen[0]
    records = read_records(layer_file(folder, 1))
    assert folder.name == "mlp" and len(records) == 4 * 24
    for neuron, record in records.items():
        expert, column = divmod(neuron, 24)
        gate, up = experts.gate_up_proj[expert].detach().view(2, 24, 16)[:, column]
        found = torch.nn.functional.silu(tokens @ gate) * (tokens @ up) * (chosen[:, 0] == expert)
        for one in record.top + record.random:
            window = found.view(4, 16)[one.excerpt, one.start : one.start + 8]
            assert torch.allclose(window, torch.tensor(one.activations), atol=1e-6)


def test_neurons_of_experts_are_asked_of_experts_only_and_cannot_be_forced(adopted, tmp_path):
    config = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    site = "model.layers.{layer}.self_attn:neurons"
    refused(adopted, tmp_path, r"layers\.0\.self_attn is no mixture of experts", config, site=site)
    model = build(config, 0)
    force = Edit(site_named("auto", model), 0, 3, "set", 1.0)
    with steered(model, [force]), pytest.raises(UserError, match="can be read only"):
        model(torch.arange(8)[None])


def test_the_inner_activations_of_mamba_are_its_neurons(adopted):
    config = MambaConfig(vocab_size=320, hidden_size=16, state_size=4, num_hidden_layers=2)
    folder = adopted(config)
    assert folder.name == "mixer" and len(read_records(layer_file(folder, 0))) == config.intermediate_size


def test_rows_in_the_order_of_the_experts_are_refused(adopted, tmp_path):
    """With one expert a token there are as many rows as tokens, but sorted."""
    config = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1)
    site = "model.layers.{layer}.mlp.experts.act_fn"
    refused(
        adopted,
        tmp_path,
        r"site .*act_fn (has a|is \d times read|does not give the tokens in the order)",
        config,
        site=site,
    )


def test_a_module_that_a_pass_never_runs_is_refused(adopted, tmp_path):
    config = BertConfig(**SHAPE, is_decoder=True, add_cross_attention=True)
    site = "bert.encoder.layer.{layer}.crossattention"
    refused(adopted, tmp_path, "is not read in a pass at layer 0", config, site=site)


def test_half_precision_that_overflows_is_told_to_take_float32(adopted, tmp_path):
    model = build(LlamaConfig(**SHAPE), 0)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.up_proj.weight.mul_(40_000)
            block.mlp.gate_proj.weight.mul_(40_000)
    said = r"layer 0: neuron \d+ is -?(inf|nan) .* in float16; .*--dtype float32"
    refused(adopted, tmp_path, said, model.half())
    assert adopted(model.half(), dtype="float32").name == "mlp"


def test_records_of_another_number_format_are_kept_apart(adopted):
    adopted(LlamaConfig(**SHAPE))
    with pytest.raises(UserError, match="was made with dtype = None, not 'bfloat16'"):
        adopted(LlamaConfig(**SHAPE), dtype="bfloat16")


def test_a_model_whose_tokens_see_later_ones_is_refused(adopted, tmp_path):
    refused(adopted, tmp_path, "see later ones", build(BertConfig(**SHAPE), 0), site="residual")
    assert adopted(BertConfig(**SHAPE, is_decoder=True)).name == "mlp"


def test_a_checkpoint_without_its_head_is_refused(adopted, tmp_path):
    def drop_head(folder):
        weights = load_file(folder / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    refused(adopted, tmp_path, r"no lm_head\.weight", LlamaConfig(**SHAPE), drop_head)


def test_a_configuration_of_fewer_layers_than_the_weights_have_is_refused(adopted, tmp_path):
    def drop_a_layer(folder):
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stated | {"num_hidden_layers": 1}))

    refused(adopted, tmp_path, "states 1 layers and its weights have 2 .*layers.1", LlamaConfig(**SHAPE), drop_a_layer)


def test_sampling_settings_that_contradict_one_another_do_no_harm(adopted):
    def contradict(folder):
        (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "do_sample": False}))

    assert adopted(LlamaConfig(**SHAPE), contradict).exists()


def test_a_model_that_is_no_causal_one_is_refused(adopted, tmp_path):
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    refused(adopted, tmp_path, "t5 model cannot be made here", t5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"cut"),
        ("config.json", b"{}"),
        ("config.json", b'{"model_type": "llama", "hidden_size": 16, "num_attention_heads": 0}'),
        ("config.json", b'{"model_type": "mystery", "auto_map": {"AutoConfig": "code.Config"}}'),
    ],
)
def test_a_damaged_or_unknown_model_is_refused(adopted, tmp_path, name, content):
    refused(adopted, tmp_path, "cannot be", LlamaConfig(**SHAPE), lambda folder: (folder / name).write_bytes(content))


def test_a_process_that_adopts_the_same_model_meanwhile_is_waited_for(data_folder, tmp_path):
    source, run, data = str(tmp_path / "model"), Run(tmp_path / "run"), TokenData.open(data_folder)
    build(LlamaConfig(**SHAPE), 0).save_pretrained(source)
    data.tokenizer.save_pretrained(source)
    holder = "import sys, time; from pathlib import Path; from cratescope.locks import locked\n"
    holder += "with locked(Path(sys.argv[1]), 'adopt'): print('ready', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", holder, run.root], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(adopt, run, source, data, "mlp", load_folder)
        time.sleep(0.3)
        assert not waiting.done() and not run.model.exists()
        other.kill()
        other.communicate()
        waiting.result()
    written = run.manifest.stat().st_mtime_ns
    adopt(run, source, data, "mlp", load_folder)  # of two the second finds it done
    assert run.manifest.stat().st_mtime_ns == written
    with pytest.raises(UserError, match="is the run of another model"):
        adopt(run, "another", data, "mlp", load_folder)
