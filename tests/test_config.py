"""Configurations: every assumption that params.json and config.json leave to their readers."""

import dataclasses

import pytest
import tiny

from mistral.config import PRESETS, ModelConfig
from mistral.model import Transformer

PARAMS = dict(
    dim=4096, n_layers=32, head_dim=128, hidden_dim=14336, n_heads=32, n_kv_heads=8, norm_eps=1e-5, vocab_size=32000
)
HF = dict(
    architectures=["MistralForCausalLM"],
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=32768,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    vocab_size=32000,
    hidden_act="silu",
    tie_word_embeddings=False,
)


def hf(**changes):
    entries = HF | changes
    return ModelConfig.from_hf({name: value for name, value in entries.items() if value != "absent"})


def test_presets_are_the_published_models():
    assert PRESETS["mistral-7b-v0.1"].parameter_count() == 7_241_732_096
    assert PRESETS["mistral-7b-v0.2"].parameter_count() == 7_241_732_096
    assert PRESETS["mistral-7b-v0.3"].parameter_count() == 7_248_023_552
    assert [c.sliding_window for c in PRESETS.values()] == [4096, None, None]
    assert [c.rope_theta for c in PRESETS.values()] == [1e4, 1e6, 1e6]


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"attention_bias": True}])
def test_parameter_count_is_that_of_the_model(changes):
    config = tiny.config(**changes)
    assert config.parameter_count() == sum(p.numel() for p in Transformer(config).parameters())


# ---- params.json ----


def test_params_of_the_first_release():
    assert ModelConfig.from_params(PARAMS | {"sliding_window": 4096}) == PRESETS["mistral-7b-v0.1"]


@pytest.mark.parametrize(("window", "theta"), [(4096, 1e4), (None, 1e6)])
def test_theta_missing_from_params_depends_on_the_window(window, theta):
    assert ModelConfig.from_params(PARAMS | {"sliding_window": window}).rope_theta == theta
    assert ModelConfig.from_params(PARAMS | {"sliding_window": window, "rope_theta": 5e5}).rope_theta == 5e5


def test_window_alias_and_lists_in_params():
    assert ModelConfig.from_params(PARAMS | {"_sliding_window": 4096}).sliding_window == 4096
    assert ModelConfig.from_params(PARAMS | {"sliding_window": [64, 64]}).sliding_window == 64
    with pytest.raises(NotImplementedError, match="one window for all layers"):
        ModelConfig.from_params(PARAMS | {"sliding_window": [None, 4096]})
    with pytest.raises(ValueError, match="must agree"):
        ModelConfig.from_params(PARAMS | {"sliding_window": 64, "_sliding_window": 32})


def test_params_without_optional_entries():
    config = ModelConfig.from_params(dict(dim=64, n_layers=1, n_heads=4, hidden_dim=96, vocab_size=10))
    assert (config.n_kv_heads, config.head_dim, config.norm_eps, config.max_positions) == (4, 16, 1e-5, 32768)
    assert ModelConfig.from_params(PARAMS | {"max_seq_len": 8192}).max_positions == 8192


def test_unknown_params_are_named():
    with pytest.raises(NotImplementedError, match="moe="):
        ModelConfig.from_params(PARAMS | {"moe": {"num_experts": 8}})
    with pytest.raises(ValueError, match="lacks n_layers"):
        ModelConfig.from_params({n: v for n, v in PARAMS.items() if n != "n_layers"})


# ---- config.json ----


def test_hf_of_the_first_release():
    assert hf() == PRESETS["mistral-7b-v0.1"]


def test_hf_new_and_legacy_rope():
    new = hf(rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    assert (new.rope_theta, new.rope_scaling) == (1e6, None)
    assert hf(rope_theta="absent").rope_theta == 1e4
    legacy = hf(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert (legacy.rope_theta, legacy.rope_scaling) == (5e5, {"rope_type": "linear", "factor": 2.0})
    yarn = hf(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0})
    assert yarn.rope_scaling["original_max_position_embeddings"] == 32768
    with pytest.raises(ValueError, match="dynamic"):
        hf(rope_scaling={"type": "dynamic", "factor": 2.0})


def test_hf_defaults_of_missing_entries():
    bare = ModelConfig.from_hf({"model_type": "mistral"})
    assert bare == dataclasses.replace(PRESETS["mistral-7b-v0.1"], norm_eps=1e-6, max_positions=131_072)


@pytest.mark.parametrize(
    ("kind", "name"), [("mistral", "MistralConfig"), ("llama", "LlamaConfig"), ("qwen2", "Qwen2Config")]
)
def test_hf_defaults_are_those_of_transformers(kind, name):
    theirs = getattr(pytest.importorskip("transformers"), name)()
    assert ModelConfig.from_hf({"model_type": kind}) == ModelConfig.from_hf(theirs.to_dict())


def test_hf_window_null_and_head_dim():
    assert hf(sliding_window=None).sliding_window is None
    assert hf(head_dim=None).head_dim == 128
    assert hf(head_dim=64).head_dim == 64
    assert hf(num_key_value_heads=None).n_kv_heads == 32


def test_hf_layer_types():
    assert hf(layer_types=["sliding_attention"] * 32).sliding_window == 4096
    assert hf(sliding_window=None, layer_types=["full_attention"] * 32).sliding_window is None
    for layers in (["full_attention", "sliding_attention"] * 16, ["full_attention"] * 32):
        with pytest.raises(NotImplementedError, match="layer_types"):
            hf(layer_types=layers)


def test_hf_llama_and_qwen2():
    llama = hf(architectures=["LlamaForCausalLM"])
    assert (llama.sliding_window, llama.attention_bias) == (None, False)
    qwen = dict(architectures=["Qwen2ForCausalLM"], max_window_layers=32)
    assert (hf(**qwen).sliding_window, hf(**qwen).attention_bias) == (None, True)
    assert hf(**qwen | dict(use_sliding_window=True, max_window_layers=0)).sliding_window == 4096
    with pytest.raises(NotImplementedError, match="layer_types"):
        hf(**qwen, use_sliding_window=True, layer_types=["full_attention", "sliding_attention"] * 16)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MixtralForCausalLM"]},
        {"architectures": ["LlamaForCausalLM"], "mlp_bias": True},
        {"architectures": ["LlamaForCausalLM"], "attention_bias": True},
        {"hidden_act": "gelu"},
        {"partial_rotary_factor": 0.5},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_what_hf_has_and_the_model_has_not_is_named(changes):
    name = "MixtralForCausalLM" if "Mixtral" in str(changes) else list(changes)[-1]
    with pytest.raises(NotImplementedError, match=name):
        hf(**changes)


# ---- values ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 5}, "multiple of n_kv_heads"),
        ({"head_dim": 15}, "must be an even int"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"dim": 0}, "dim is 0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"rope_theta": -1.0}, "theta is -1.0"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks"),
    ],
)
def test_values_that_cannot_be_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.config(**changes)


def test_with_window():
    config = tiny.config(sliding_window=8)
    assert config.with_window("config") is config
    assert config.with_window(3) == tiny.config(sliding_window=3)
    assert config.with_window(None) == tiny.config()
    with pytest.raises(ValueError, match="'full'"):
        config.with_window("full")
