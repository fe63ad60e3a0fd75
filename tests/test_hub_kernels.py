"""The folder in Hugging Face's `kernels` format, loaded and used by that package (make test-transformers has it)."""

from pathlib import Path

import pytest
import torch
from test_patch import make, run, tokens

pytest.importorskip("kernels.layer", reason="needs the package kernels, of a version that transformers takes")
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path(__file__).parents[1] / "huggingface"
NAMES = {"RMSNorm": "RMSNorm", "rotary_pos_emb": "apply_rotary_transformers"}


def mapping(mode: Mode) -> dict:
    return {ours: {"cpu": {mode: LocalLayerRepository(FOLDER, layer_name=layer)}} for ours, layer in NAMES.items()}


@pytest.mark.parametrize("family", ["mistral", "llama", "qwen3"])
@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE])
def test_kernelize(mode, family, monkeypatch):
    import mistral_kernels

    model, ids = make(family), tokens()
    expected = run(model, ids)
    calls = {"rms_norm": 0, "rope": 0}
    with use_kernel_mapping(mapping(mode), inherit_mapping=False):
        kernelize(model, mode=mode, device="cpu")
    for name in calls:
        plain = getattr(mistral_kernels, name)

        def counted(*args, plain=plain, name=name):
            calls[name] += 1
            return plain(*args)

        monkeypatch.setattr(mistral_kernels, name, counted)
    found = run(model, ids)
    assert all(calls.values()), calls
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.slow
def test_compile():
    model, ids = make(), tokens()
    expected = run(model, ids)
    mode = Mode.TRAINING | Mode.TORCH_COMPILE
    with use_kernel_mapping(mapping(mode), inherit_mapping=False):
        kernelize(model, mode=mode, device="cpu")
    model.train()
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True)(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-5, rtol=1e-3, msg=name)
