"""Training patched models: the Trainer, LoRA, FSDP2, accelerate's hooks, Liger's flags."""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_patch import OPS, make, run, tokens

from mistral_kernels.patch import AutoKernelsForCausalLM, apply_kernels, patch, unpatch

transformers = pytest.importorskip("transformers", minversion="5.20")
pytestmark = pytest.mark.usefixtures("one_thread")


def attended(model, run_it) -> int:
    """How often the first layer's attention ran: twice where the backward pass computed the layer again."""
    calls = []
    handle = model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    run_it()
    handle.remove()
    return len(calls)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("ops", [OPS, ["add_rms_norm"], ["rms_norm", "rope", "swiglu", "attention"]], ids=len)
def test_gradient_checkpointing(ops, reentrant):
    model, ids = make(), tokens()
    patch(model, ops=ops)
    expected = run(model, ids)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    found = {}
    assert attended(model, lambda: found.update(run(model, ids))) == 3  # the third: the logits, without gradients
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-7, rtol=1e-6, msg=name)


@pytest.mark.parametrize("fuses", [True, False])
def test_gradient_checkpointing_of_classes_and_copies(fuses):
    ids = tokens()

    def computes_again(model):
        if not fuses:
            model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: None)
        model.gradient_checkpointing_enable()
        model.train()
        return attended(model, lambda: model(ids, labels=ids, use_cache=True).loss.backward()) == 2

    assert computes_again(make())
    try:
        patch("mistral")
        model = make()
        assert computes_again(model)
        patch(model)
    finally:
        unpatch("mistral")
    patched = make()
    patch(patched)
    for other in (model, make(), copy.deepcopy(patched)):
        assert computes_again(other)


def curve(model, folder, steps: int) -> list[float]:
    pytest.importorskip("accelerate", reason="the Trainer needs it: pip install mistral-kernels[hf]")
    rows = [dict(input_ids=(t := tokens(1, seed=n % 2)[0]), labels=t) for n in range(64)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lora(model):
    peft = pytest.importorskip("peft", reason="pip install mistral-kernels[hf]")
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("steps", [8, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapt", [False, True])
def test_trainer(adapt, steps, tmp_path):
    wrap = lora if adapt else (lambda model: model)
    expected = curve(wrap(make()), tmp_path, steps)
    model = wrap(make())
    report = patch(model)
    assert len(set(report.replaced.values())) == 6, str(report)
    found = curve(model, tmp_path, steps)
    assert len(found) == steps and expected[-1] < expected[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=2e-3, rtol=0)


def test_lora_before_and_after():
    ids = tokens()
    before, after = make(), lora(make())
    patch(before)
    before = lora(before)
    patch(after)
    torch.testing.assert_close(before(ids).logits, after(ids).logits)
    unpatch(after)
    assert torch.equal(after(ids).logits, lora(make())(ids).logits)


def test_accelerate_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    model, ids = make(), tokens()
    expected = run(model, ids)
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    report = patch(model)
    assert len(report.replaced) > 10 and not report.left
    for name, value in run(model, ids).items():
        torch.testing.assert_close(value, expected[name], atol=2e-5, rtol=1e-3, msg=name)
    unpatch(model)
    assert all(torch.equal(value, expected[name]) for name, value in run(model, ids).items())


@pytest.fixture
def process_group():
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("first", ["patch", "shard"])
@pytest.mark.parametrize("norms", [False, True])
def test_fully_shard(process_group, first, norms):
    from torch.distributed.fsdp import fully_shard

    model, ids = make(), tokens()
    expected = run(model, ids)
    if first == "patch":
        patch(model)
    for layer in model.model.layers:
        if norms:
            fully_shard(layer.post_attention_layernorm, mesh=process_group)
        fully_shard(layer, mesh=process_group)
    fully_shard(model, mesh=process_group)
    if first == "shard":
        report = patch(model)
        assert len(set(report.replaced.values())) == 6, str(report)
    found = run(model, ids)
    for name, value in expected.items():
        got = found[name].full_tensor() if hasattr(found[name], "full_tensor") else found[name]
        torch.testing.assert_close(got, value, atol=2e-5, rtol=1e-3, msg=name)


def test_fully_shard_in_two_processes():
    """Each has half of the rows and of the weights; the gradients are those of all rows in one process."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed")
    here = Path(__file__).parent
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    environment["PYTHONPATH"] = os.pathsep.join(str(here.parent / part) for part in ("kernels", "", "tests"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(here / "fsdp_patched.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert all(f"rank {n} of 2 agrees" in done.stderr for n in range(2))


def test_flags():
    report = apply_kernels(make(), rms_norm=False, fused_linear_cross_entropy=False)
    assert set(report.replaced.values()) == {"rope", "swiglu", "attention"}
    with pytest.raises(ValueError, match="cross_entropy is True"):
        apply_kernels(make(), cross_entropy=True)
    model = AutoKernelsForCausalLM.from_config(make().config, swiglu=False)
    assert "swiglu" in patch(model).replaced.values()
    assert model.config._attn_implementation == "mistral_kernels"
