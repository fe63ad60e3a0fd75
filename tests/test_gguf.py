"""GGUF files: a real one against transformers, small ones in every type and rotary scaling, and what is refused."""

import dataclasses
from functools import partial

import pytest
import tiny
import torch

from mistral import convert, weights
from mistral.config import ModelConfig
from mistral.generate import generate
from mistral.gguf_file import open_gguf
from mistral.samples import smollm2_path
from mistral.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")
load = partial(weights.load_model, dtype=torch.float32, progress=False)
# Blocks of quantised types are 32 wide.
SMALL = tiny.config(dim=64, hidden_dim=96)
NAMES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "output": "output",
}


def interleave(w, heads: int):
    """As llama.cpp's converter writes q and k."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(path, net, kind="F32", keys=(), tensors=()):
    """A GGUF file of a model, as llama.cpp's converter would write it."""
    c, writer = net.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(c.n_layers)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_vocab_size(c.vocab_size)
    for key, value in dict(keys).items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](key, value)
    for name, tensor in net.state_dict().items():
        values, part = tensor.numpy(), name.removeprefix("layers.").removesuffix(".weight")
        layer, _, inner = part.partition(".")
        if layer.isdigit():
            stored = f"blk.{layer}.{NAMES[inner]}.weight"
            heads = {"attention.wq": c.n_heads, "attention.wk": c.n_kv_heads}.get(inner)
            values = values if heads is None else interleave(values, heads)
        else:
            stored = f"{NAMES[part]}.weight"
        type_ = gguf.GGMLQuantizationType["F32" if tensor.dim() == 1 else kind]
        writer.add_tensor(stored, gguf.quants.quantize(values, type_), raw_dtype=type_)
    for name, values in dict(tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def small(**changes):
    return tiny.model(**dataclasses.asdict(dataclasses.replace(SMALL, **changes)))


# ---- small files ----

# The largest error of each type, as a share of the largest weight.
TYPES = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 2**-7, "Q4_1": 0.07, "Q4_0": 0.13}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_type_gives_back_the_weights(tmp_path, kind, tied):
    net = small(tie_embeddings=tied)
    found = load(write(tmp_path / "x.gguf", net, kind))
    assert found.config == net.config
    for name, tensor in found.state_dict().items():
        wanted = net.state_dict()[name]
        limit = 0 if tensor.dim() == 1 else TYPES[kind] * wanted.abs().max()
        assert tensor.shape == wanted.shape and (tensor - wanted).abs().max() <= limit, name
    stored = open_gguf(tmp_path / "x.gguf").tensors["layers.0.attention.wq.weight"]
    assert stored.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)


def test_a_file_becomes_the_same_model_in_every_format(tmp_path):
    file = write(tmp_path / "x.gguf", small(), "Q8_0")
    for target in ("hf", "mistral"):
        weights.save_checkpoint(weights.open_checkpoint(file), tmp_path / target, target, progress=False)
        assert all(
            torch.equal(tensor, load(file).state_dict()[name])
            for name, tensor in load(tmp_path / target).state_dict().items()
        )


LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def llama3_divisors(theta=10_000.0, size=16, factor=8.0, low=1.0, high=4.0, context=8192):
    """As llama.cpp's converter writes rope_freqs.weight."""
    np, found = pytest.importorskip("numpy"), []
    for i in range(0, size, 2):
        wave = 2 * np.pi * theta ** (i / size)
        smooth = (context / wave - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if wave < context / high else factor if wave > context / low else middle)
    return np.array(found, dtype=np.float32)


@pytest.mark.parametrize(
    "keys, wanted",
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, dict(rope_type="linear", factor=4.0)),
        ({"llama.rope.scale_linear": 2.5}, dict(rope_type="linear", factor=2.5)),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
            },
            dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0),
        ),
        ({"llama.attention.causal": True, "llama.expert_count": 0}, None),
    ],
)
def test_rotary_scaling_is_read(tmp_path, keys, wanted):
    assert load(write(tmp_path / "x.gguf", small(), keys=keys)).config == dataclasses.replace(
        SMALL, rope_scaling=wanted
    )


def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path):
    write(tmp_path / "x.gguf", small(), tensors={"rope_freqs.weight": llama3_divisors()})
    assert load(tmp_path / "x.gguf").config.rope_scaling == LLAMA3
    write(tmp_path / "y.gguf", small(), tensors={"rope_freqs.weight": llama3_divisors(high=5.0)})
    with pytest.raises(NotImplementedError, match=r"rope_freqs\.weight.*config\.json states the scaling"):
        load(tmp_path / "y.gguf")


def test_the_window_is_read(tmp_path):
    assert weights.read_config(write(tmp_path / "x.gguf", small(), keys={"llama.attention.sliding_window": 9})) == (
        dataclasses.replace(SMALL, sliding_window=9)
    )


@pytest.mark.parametrize(
    "keys, error, message",
    [
        ({"llama.expert_count": 8}, NotImplementedError, r"llama\.expert_count=8"),
        ({"llama.attention.scale": 0.5}, NotImplementedError, r"llama\.attention\.scale=0\.5"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, NotImplementedError, "longrope"),
        ({"split.count": 3}, NotImplementedError, "one of 3 parts.*--merge"),
    ],
)
def test_features_that_the_model_lacks_are_named(tmp_path, keys, error, message):
    with pytest.raises(error, match=message):
        load(write(tmp_path / "x.gguf", small(), keys=keys))


def test_broken_files_are_refused(tmp_path):
    file = write(tmp_path / "x.gguf", small())
    whole = file.read_bytes()
    for keep in (4, 40, 700, len(whole) // 2, len(whole) - 100):
        file.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=rf"x\.gguf \({keep} bytes\) is no whole GGUF file"):
            load(file)
    np = pytest.importorskip("numpy")
    write(file, small(), tensors={"blk.0.attn_q_norm.weight": np.ones(16, np.float32)})
    with pytest.raises(ValueError, match=r"unknown \(1\): blk\.0\.attn_q_norm\.weight \[16\]"):
        load(file)


# ---- SmolLM2-135M-Instruct ----


@pytest.fixture(scope="module")
def smollm2():
    return load(smollm2_path())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(smollm2_path())


def test_the_samples_config(smollm2):
    assert smollm2.config == ModelConfig(
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        hidden_dim=1536,
        vocab_size=49_152,
        norm_eps=1e-5,
        rope_theta=100_000.0,
        max_positions=8192,
        tie_embeddings=True,
    )
    assert smollm2.config.parameter_count() == 134_515_008


HF_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hugging_face():
    """LlamaForCausalLM from the file, with the rows of q and k put back in order by index."""
    transformers = pytest.importorskip("transformers")
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(smollm2_path()).tensors}
    config = transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=100_000.0),
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight":
            state[name] = torch.tensor(tensors["token_embd.weight"])
            continue
        stored = name.removeprefix("model.").replace("layers.", "blk.").replace("embed_tokens", "token_embd")
        for part, theirs in HF_NAMES.items():
            stored = stored.replace(theirs, NAMES[part])
        stored = "output_norm.weight" if stored == "norm.weight" else stored
        values = torch.tensor(tensors[stored])
        if "attn_q" in stored or "attn_k" in stored:
            rows = [h * 64 + 2 * i + j for h in range(values.shape[0] // 64) for j in range(2) for i in range(32)]
            values = values[rows]
        state[name] = values
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def test_the_samples_logits_are_those_of_transformers(smollm2, tokenizer):
    ids = torch.tensor([tokenizer.encode("The sea looks blue because water absorbs red light.")])
    with torch.inference_mode():
        wanted = hugging_face()(ids).logits
        found = smollm2(ids)
    assert (found - wanted).abs().max() < 2e-4 * wanted.abs().max()


def test_the_sample_answers(smollm2, tokenizer):
    prompt = tokenizer.encode_chat([{"role": "user", "content": "What is the capital of France?"}])
    done = generate(smollm2, [prompt], max_tokens=16, stop_ids=tokenizer.stop_ids, progress=False)
    assert tokenizer.decode(done.tokens[0]) == "The capital of France is Paris."


def test_the_sample_converts_with_its_tokenizer(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(convert, "save_checkpoint", lambda *_, **__: None)  # the weights are judged above
    assert convert.main([str(smollm2_path()), str(tmp_path), "--to", "hf"]) == 0
    copied = load_tokenizer(tmp_path)
    chat = [{"role": "user", "content": "Hi\n123"}]
    assert copied.encode_chat(chat) == tokenizer.encode_chat(chat)
    assert (copied.bos_id, copied.stop_ids) == (tokenizer.bos_id, tokenizer.stop_ids) == (None, (2, 0))
