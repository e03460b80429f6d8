"""The local engine: a shared prefix, batches and slots give what one plain forward pass gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    MoshiConfig,
    MptConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3MoeConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from cratescope.errors import UserError
from cratescope.llm import prefix as engine
from cratescope.llm.config import LLMConfig
from cratescope.llm.interface import LanguageModel
from cratescope.llm.local import LocalLLM
from cratescope.llm.open import llm_identity, open_llm
from cratescope.models import CrateConfig
from cratescope.text.tokenizer import train_bpe
from scripted import ScriptedLLM
from tiny_models import tiny_config, tiny_model

LINES = ["the dog saw the cat, and the cat ran.", "ten boats on the river\n\tand one bridge"] * 8
PREFIX = "the dog saw the cat.\n\n"
PROMPTS = ["the", "one bridge on the river and", "the cat, and the dog\n", "boats"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_bpe(iter(LINES), 300)


def configuration(architecture: str, layers: int, **shape: int) -> PreTrainedConfig:
    if architecture == "gpt2":
        sizes = {"n_positions": shape.pop("max_position_embeddings"), "n_embd": 32, "n_layer": layers, "n_head": 4}
        return GPT2Config(**shape, **sizes)
    if architecture == "bloom":
        return BloomConfig(vocab_size=shape["vocab_size"], hidden_size=32, n_layer=layers, n_head=4)
    sizes = shape | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    if architecture == "neox":
        return GPTNeoXConfig(**sizes)
    sizes["num_key_value_heads"] = 2
    if architecture == "mistral":
        return MistralConfig(**sizes, sliding_window=12)
    if architecture == "gemma2":
        return Gemma2Config(**sizes, head_dim=8, sliding_window=12)
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[architecture](**sizes)


def tiny(architecture: str, tokenizer: PreTrainedTokenizerFast, context: int = 64, layers: int = 2) -> torch.nn.Module:
    return tiny_of(configuration(architecture, layers, vocab_size=len(tokenizer), max_position_embeddings=context))


def tiny_of(config: PreTrainedConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    # Larger weights than at initialisation, so that positions and masks matter to the answers.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.eos_token_id = None
    return model.eval()


OF_OTHERS = {
    "bloom": "copied",
    "crate": "shared",
    "falcon": "copied",
    "gemma3": "copied",
    "gptj": "copied",
    "jamba": "reread",
    "lfm2": "reread",
    "mamba": "reread",
    "mamba2": "reread",
    "modernbert-decoder": "copied",
    "moshi": "reread",
    "mpt": "copied",
    "opt": "shared",
    "phi": "shared",
    "qwen3_moe": "shared",
    "recurrent_gemma": "reread",
    "rwkv": "reread",
}
"""How models run whose attention has biases, windows or states, or none."""


def other_configuration(architecture: str, vocab_size: int) -> PreTrainedConfig:
    """A tiny model of one of `OF_OTHERS`."""
    size: dict[str, int] = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2}
    heads = size | {"intermediate_size": 48, "num_attention_heads": 4, "max_position_embeddings": 128}
    groups = heads | {"num_key_value_heads": 2}
    short = {"vocab_size": vocab_size, "n_head": 4, "n_layer": 2}
    windowed = groups | {"head_dim": 8, "sliding_window": 12}
    vision = dict.fromkeys(("hidden_size", "intermediate_size"), 16)
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    periods = dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2)
    periods |= dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1)
    make: dict[str, Callable[[], PreTrainedConfig]] = {
        "bloom": lambda: BloomConfig(**short, hidden_size=32),
        "crate": lambda: CrateConfig(**short, n_embd=32, n_positions=128),
        "falcon": lambda: FalconConfig(**size, num_attention_heads=4, alibi=True),
        "gemma3": lambda: Gemma3Config(text_config=windowed, vision_config=vision),
        "gptj": lambda: GPTJConfig(**short, n_embd=32, n_positions=128, rotary_dim=4),
        "jamba": lambda: JambaConfig(**groups, **periods, num_experts=2, mamba_d_state=4, mamba_dt_rank=4),
        "lfm2": lambda: Lfm2Config(**groups, full_attn_idxs=[1], block_ff_dim=48),
        "mamba": lambda: MambaConfig(**size, state_size=4),
        "mamba2": lambda: Mamba2Config(**size, state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
        "modernbert-decoder": lambda: ModernBertDecoderConfig(
            **heads,
            **dict.fromkeys(("pad_token_id", "eos_token_id"), 0),
            local_attention=12,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "moshi": lambda: MoshiConfig(**groups, ffn_dim=48, sliding_window=12),
        "mpt": lambda: MptConfig(vocab_size=vocab_size, d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
        "opt": lambda: OPTConfig(**size, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32),
        "phi": lambda: PhiConfig(**heads),
        "qwen3_moe": lambda: Qwen3MoeConfig(**groups, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        "recurrent_gemma": lambda: RecurrentGemmaConfig(
            **heads | {"num_hidden_layers": 3}, num_key_value_heads=1, lru_width=32, attention_window_size=12
        ),
        "rwkv": lambda: RwkvConfig(**size, attention_hidden_size=32, intermediate_size=48),
    }
    return make[architecture]()


SHARED = ("gpt2", "llama", "qwen2", "neox")
"""The others have windows or caps in their attention."""


@pytest.fixture(scope="module", params=[*SHARED, "mistral", "gemma2"])
def llm(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> LocalLLM:
    llm = LocalLLM(tiny(request.param, tokenizer), tokenizer, "tiny")
    assert (llm.way == "shared") == (request.param in SHARED)
    return llm


def plain(llm: LocalLLM, ids: list[int]) -> np.ndarray:
    """log P(next token) after every position, by one forward pass without a cache."""
    with torch.inference_mode():
        return llm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1).numpy()


def test_next_logprobs_equal_a_full_forward_pass(llm: LocalLLM) -> None:
    prefix, prompts = llm.encode(PREFIX), [llm.encode(text) for text in PROMPTS]
    found = llm.next_logprobs(prefix, prompts)
    for row, prompt in zip(found, prompts, strict=True):
        np.testing.assert_allclose(row, plain(llm, prefix + prompt)[-1], atol=1e-5)


def test_slot_logprobs_equal_a_full_forward_pass_and_are_aligned(llm: LocalLLM) -> None:
    prefix, prompts = llm.encode(PREFIX), [llm.encode(text) for text in PROMPTS[1:3]]
    slots = [[1, 3, len(prompts[0]) - 1], [2]]
    choices = llm.encode("dog")
    found = llm.slot_logprobs(prefix, prompts, slots, choices)
    assert [rows.shape for rows in found] == [(3, len(choices)), (1, len(choices))]
    for rows, prompt, places in zip(found, prompts, slots, strict=True):
        expected = plain(llm, prefix + prompt)[[len(prefix) + place - 1 for place in places]][:, choices]
        np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_choices_of_several_tokens_are_scored_as_sequences(llm: LocalLLM) -> None:
    prefix, prompts = llm.encode(PREFIX), [llm.encode(text) for text in PROMPTS[1:3]]
    slots = [[1, len(prompts[0])], [3, 4]]
    choices = [[5], [5, 7], [5, 7, 9], [6, 8], [9]]
    found = llm.slot_logprobs(prefix, prompts, slots, choices)
    for rows, prompt, places in zip(found, prompts, slots, strict=True):
        for row, slot in zip(rows, places, strict=True):
            for value, choice in zip(row, choices, strict=True):
                before = prefix + prompt[:slot]
                logprobs = plain(llm, before + choice)[len(before) - 1 :]
                expected = sum(logprobs[step][token] for step, token in enumerate(choice))
                assert value == pytest.approx(expected, abs=2e-5)
    single = llm.slot_logprobs(prefix, prompts, slots, [5, 9])
    for one, several in zip(single, found, strict=True):
        np.testing.assert_allclose(one, several[:, [0, 4]], atol=1e-5)


def test_a_slot_does_not_see_what_is_in_it_or_behind_it(llm: LocalLLM) -> None:
    prefix, prompt, choices = llm.encode(PREFIX), llm.encode(PROMPTS[1]), llm.encode("cat")
    other = [*prompt[:2], *reversed(prompt[2:])]
    one, two = (llm.slot_logprobs(prefix, [ids], [[2, 4]], choices)[0] for ids in (prompt, other))
    np.testing.assert_allclose(one[0], two[0], atol=1e-5)
    assert np.abs(one[1] - two[1]).max() > 1e-3


def test_a_slot_at_the_very_start_is_refused(llm: LocalLLM) -> None:
    with pytest.raises(ValueError, match="before it"):
        llm.slot_logprobs([1], [[2, 3]], [[0]], [4])


def test_generation_is_the_greedy_one_whatever_else_is_in_the_batch(llm: LocalLLM) -> None:
    prefix, prompts = llm.encode(PREFIX), [llm.encode(text) for text in PROMPTS]
    together = llm.generate(prefix, prompts, 8, "<never>")
    for prompt, text in zip(prompts, together, strict=True):
        ids = prefix + prompt
        for _ in range(8):
            ids = [*ids, int(plain(llm, ids)[-1].argmax())]
        assert text == llm.tokenizer.decode(ids[len(prefix) + len(prompt) :]).split("<|endoftext|>")[0]
    assert llm.generate(prefix, prompts[::-1], 8, "<never>") == together[::-1]
    assert len(set(together)) > 1


def test_generation_stops_before_the_stop_text_and_at_the_end_of_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    llm = LocalLLM(tiny("gpt2", tokenizer), tokenizer, "tiny")
    prefix, prompt = llm.encode(PREFIX), llm.encode("the")
    text = llm.generate(prefix, [prompt], 8, "<never>")[0]
    stop = text[len(text) // 2]
    assert llm.generate(prefix, [prompt], 8, stop) == [text[: text.index(stop)]]
    first = int(plain(llm, prefix + prompt)[-1].argmax())
    llm.model.generation_config.eos_token_id = first
    assert llm.generate(prefix, [prompt, llm.encode("boats")], 8, "<never>")[0] == ""


def test_a_prefix_is_computed_once_and_several_are_kept(llm: LocalLLM) -> None:
    seen: list[tuple[int, ...]] = []
    hook = llm.model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(out.shape[:2]))
    one, two, asked = llm.encode("one bridge, ten boats.\n"), llm.encode("the cat ran.\n"), llm.encode("the cat")
    for prefix in (one, two, one, two):
        llm.next_logprobs(prefix, [asked, asked])
    hook.remove()
    batch = (2, len(asked))
    assert seen == [(1, len(one)), batch, (1, len(two)), batch, batch, batch]


def test_finished_rows_leave_the_batch(llm: LocalLLM) -> None:
    prefix, prompts = llm.encode(PREFIX), [llm.encode(text) for text in PROMPTS]
    texts = llm.generate(prefix, prompts, 8, "<never>")
    stop = next(sign for sign in "".join(texts) if any(sign not in text for text in texts))
    sizes: list[int] = []
    hook = llm.model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: sizes.append(out.shape[0]))
    assert llm.generate(prefix, prompts, 8, stop) == [text.split(stop)[0] for text in texts]
    hook.remove()
    assert sizes.count(len(prompts)) < 8


def test_an_empty_prefix_is_no_special_case(llm: LocalLLM) -> None:
    prompts = [llm.encode(text) for text in PROMPTS]
    for row, prompt in zip(llm.next_logprobs([], prompts), prompts, strict=True):
        np.testing.assert_allclose(row, plain(llm, prompt)[-1], atol=1e-5)


def kl(one: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence of log-probabilities `other` from `one`, in nats."""
    return float((np.exp(one) * (one - other)).sum(-1).mean())


@pytest.mark.parametrize("architecture", SHARED)
def test_bfloat16_rounds_only_what_is_multiplied(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    narrow = tiny(architecture, tokenizer, layers=16).bfloat16()
    exact = LocalLLM(copy.deepcopy(narrow).float(), tokenizer, "exact")
    # Enough prompts that the mean divergence is not that of one close call.
    texts = [" ".join(line.split()[:end]) for line in LINES[:2] for end in range(1, 7)]
    prefix, prompts = exact.encode(PREFIX), [exact.encode(text) for text in texts]
    expected = exact.next_logprobs(prefix, prompts)
    with torch.inference_mode():
        logits = [narrow(input_ids=torch.tensor([prefix + prompt])).logits[0, -1].float() for prompt in prompts]
    rounded = torch.stack(logits).log_softmax(-1).numpy()
    llm = LocalLLM(narrow, tokenizer, "tiny")
    assert (llm.dtype, llm.way, llm.model.dtype) == ("bfloat16", "shared", torch.float32)
    assert {weight.dtype for name, weight in narrow.named_parameters() if ".mlp." in name} == {torch.bfloat16}
    found = llm.next_logprobs(prefix, prompts)
    assert 0 < kl(expected, found) < kl(expected, rounded) / 1.5
    texts = llm.generate(prefix, prompts, 8, "<never>")
    assert texts == llm.generate(prefix, prompts[::-1], 8, "<never>")[::-1]


def test_a_bfloat16_model_that_multiplies_without_linear_layers_stays_as_it_was(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny("llama", tokenizer).bfloat16()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    bare = model.model.layers[1].mlp
    bare.forward = lambda x: F.linear(F.linear(x, bare.up_proj.weight), bare.down_proj.weight)
    llm = LocalLLM(model, tokenizer, "tiny")
    assert llm.way == "shared"
    after = dict(model.named_parameters())
    assert all(after[name].dtype == torch.bfloat16 and after[name].equal(weight) for name, weight in before.items())
    assert np.isfinite(llm.next_logprobs(llm.encode(PREFIX), [llm.encode("the")])).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", SHARED)
def test_the_trial_finds_an_attention_that_is_not_the_models_own(
    architecture: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = engine.attend
    monkeypatch.setattr(engine, "attend", lambda *given, **named: own(*given, **named | {"scaling": 0.0}))
    model = tiny(architecture, tokenizer).to(dtype)
    try:
        assert not engine.share_prefix(model, engine.in_one_pass(model)[0])
    finally:
        AttentionInterface.register(engine.NAME, own)  # for the models of other tests
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("architecture", OF_OTHERS)
def test_a_model_with_an_attention_or_a_state_of_its_own_gives_what_plain_passes_give(
    architecture: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    llm = LocalLLM(tiny_of(other_configuration(architecture, len(tokenizer))), tokenizer, "tiny")
    assert llm.way == OF_OTHERS[architecture]
    prefix, prompts = llm.encode(PREFIX * 2), [llm.encode(text) for text in PROMPTS]
    for row, prompt in zip(llm.next_logprobs(prefix, prompts), prompts, strict=True):
        np.testing.assert_allclose(row, plain(llm, prefix + prompt)[-1], atol=5e-5)
    slots, choices = [[1, len(prompt)] for prompt in prompts], [[5], [5, 7]]
    found = llm.slot_logprobs(prefix, prompts, slots, choices)
    for rows, prompt, places in zip(found, prompts, slots, strict=True):
        for row, slot in zip(rows, places, strict=True):
            before = prefix + prompt[:slot]
            first, second = plain(llm, [*before, 5])[len(before) - 1 :]
            np.testing.assert_allclose(row, [first[5], first[5] + second[7]], atol=5e-5)
    for prompt, text in zip(prompts, llm.generate(prefix, prompts, 3, "<never>"), strict=True):
        ids = prefix + prompt
        for _ in range(3):
            ids = [*ids, int(plain(llm, ids)[-1].argmax())]
        assert text == tokenizer.decode(ids[len(prefix) + len(prompt) :]).split("<|endoftext|>")[0]


def test_an_empty_prefix_and_another_one_are_no_special_case_without_a_cache(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    llm = LocalLLM(tiny_of(other_configuration("mamba", len(tokenizer))), tokenizer, "tiny")
    prompt = llm.encode("one bridge")
    for prefix in ([], llm.encode(PREFIX), llm.encode("ten boats"), []):
        np.testing.assert_allclose(llm.next_logprobs(prefix, [prompt])[0], plain(llm, prefix + prompt)[-1], atol=5e-5)


@pytest.mark.parametrize("architecture", ["jamba", "qwen3_moe", "falcon", "mamba"])
def test_in_bfloat16_too_the_trial_finds_a_way(architecture: str, tokenizer: PreTrainedTokenizerFast) -> None:
    llm = LocalLLM(tiny_of(other_configuration(architecture, len(tokenizer))).bfloat16(), tokenizer, "tiny")
    assert llm.way == OF_OTHERS[architecture]
    assert np.isfinite(llm.next_logprobs(llm.encode(PREFIX), [llm.encode("the")])).all()


def test_a_model_that_looks_ahead_is_refused_when_it_is_opened(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny_of(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match="--llm .*: its logits depend on tokens behind; choose a causal model"
    ) as refusal:
        open_llm(LLMConfig(llm=str(tmp_path), llm_device="cpu", llm_dtype="float32"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("entry", [0, -1])
def test_a_model_with_weights_that_are_not_numbers_is_refused_for_that(
    entry: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny("llama", tokenizer)
    list(model.parameters())[entry].data[:] = float("nan")
    with pytest.raises(UserError, match="--llm broken: its weights give NaN; get them again"):
        LocalLLM(model, tokenizer, "broken")


def test_a_model_whose_logits_depend_on_how_much_is_read_is_read_again_for_every_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # The index of its sparse attention has ties, and which of them count depends on the number of tokens.
    model = tiny_model("dots3_note_text")
    llm = LocalLLM(model, tokenizer, "tiny")
    prefix, prompt = llm.encode(PREFIX * 2), llm.encode("one bridge")
    assert llm.way == "reread"
    np.testing.assert_allclose(llm.next_logprobs(prefix, [prompt])[0], plain(llm, prefix + prompt)[-1], atol=5e-5)


def test_a_hybrid_without_any_attention_is_read_again_for_every_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny_config("granitemoehybrid")
    config.layer_types = ["linear_attention"] * 2
    assert LocalLLM(tiny_of(config), tokenizer, "tiny").way == "reread"


def test_a_model_without_a_longest_context_reads_prompts_of_any_length(tokenizer: PreTrainedTokenizerFast) -> None:
    llm = LocalLLM(tiny_of(other_configuration("mamba", len(tokenizer))), tokenizer, "tiny")
    assert llm.next_logprobs(list(range(250)), [list(range(50))]).shape == (1, len(tokenizer))


def test_four_bits_without_the_hardware_are_refused() -> None:
    with pytest.raises(UserError, match="--llm-quantize 4bit needs a CUDA device"):
        open_llm(LLMConfig(llm_device="cpu", llm_quantize="4bit"))


def test_another_prefix_is_not_answered_from_the_old_one(llm: LocalLLM) -> None:
    prompt = llm.encode("the")
    llm.next_logprobs(llm.encode(PREFIX), [prompt])
    other = llm.encode("ten boats")
    np.testing.assert_allclose(llm.next_logprobs(other, [prompt])[0], plain(llm, other + prompt)[-1], atol=1e-5)


def test_a_prompt_longer_than_the_context_names_both_sizes(tokenizer: PreTrainedTokenizerFast) -> None:
    llm = LocalLLM(tiny("llama", tokenizer, context=16), tokenizer, "tiny")
    with pytest.raises(UserError, match=r"needs 19 tokens and the model reads 16"):
        llm.next_logprobs(list(range(9)), [list(range(10))])
    with pytest.raises(UserError, match=r"needs 17 tokens and the model reads 16"):
        llm.generate(list(range(4)), [list(range(5))], 8, "\n")


def test_encode_gives_the_names_of_special_tokens_as_plain_text(llm: LocalLLM) -> None:
    ids = llm.encode("a<|endoftext|>")
    assert llm.tokenizer.eos_token_id not in ids
    assert llm.tokenizer.decode(ids) == "a<|endoftext|>"


def test_a_sentencepiece_tokenizer_puts_no_space_before_a_piece() -> None:
    pieces = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    pieces.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>"], initial_alphabet=["\n", "\t", "5", "▁"], show_progress=False
    )
    pieces.train_from_iterator(LINES[::2], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", eos_token="<unk>")
    llm = LocalLLM(tiny("llama", wrapped), wrapped, "tiny")
    assert wrapped.convert_ids_to_tokens(llm.encode("5")) == ["5"]
    assert wrapped.convert_ids_to_tokens(llm.encode("dog"))[0][0] == "d"


def test_open_llm_reads_a_saved_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("llama", tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = LLMConfig(llm=str(tmp_path), llm_device="cpu", llm_dtype="float32")
    llm = open_llm(config)
    assert isinstance(llm, LanguageModel) and llm_identity(config, None) == llm_identity(config, llm)
    direct = LocalLLM(model, tokenizer, "direct")
    prefix, prompt = llm.encode(PREFIX), llm.encode("the")
    assert (llm.name, llm.dtype) == (str(tmp_path), "float32")
    np.testing.assert_allclose(llm.next_logprobs(prefix, [prompt]), direct.next_logprobs(prefix, [prompt]), atol=1e-6)


def test_a_model_that_does_not_share_its_prefix_says_so(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    mamba = tiny_of(other_configuration("mamba", len(tokenizer)))
    models = {"llama": tiny("llama", tokenizer), "mistral": tiny("mistral", tokenizer), "mamba": mamba}
    for (name, model), told in zip(models.items(), ("", "which is slower", "much slower"), strict=True):
        folder = str(tmp_path / name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        open_llm(LLMConfig(llm=folder, llm_device="cpu", llm_dtype="bfloat16"))
        said = capsys.readouterr().err
        assert told in said and ("slower" in said) == bool(told)


@pytest.mark.parametrize("name", ["{}/empty", "{}/missing.gguf"])
def test_a_model_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name.format(tmp_path)):
        open_llm(LLMConfig(llm=name.format(tmp_path)))


def test_the_scripted_model_gives_normalised_probabilities_and_its_answers() -> None:
    llm = ScriptedLLM(answer=lambda prompt: f" {prompt[-3:]}!\nmore", logit=lambda _, token: 3.0 * (token == " dog"))
    ids = llm.encode("a dog saw 10\tcats")
    assert llm.decode(ids) == "a dog saw 10\tcats"
    assert len(llm.encode("10")) == 1
    logprobs = llm.next_logprobs([], [ids])[0]
    assert np.exp(logprobs).sum() == pytest.approx(1)
    assert logprobs.argmax() == llm.encode(" dog")[0]
    assert llm.generate([], [ids], 60, "\n") == [" ats!"]
