"""Run by torchrun: a patched model under `fully_shard`, in as many processes as there are, against one without both."""

import sys

import torch
from test_patch import make, run, tokens
from test_patch_train import attended
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mistral_kernels.patch import patch


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(mesh, first: str, mixed: bool):
    model = make()
    how = dict(mesh=mesh)
    if mixed:
        how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if first == "patch":
        patch(model)
    for layer in model.model.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    if first == "shard":
        report = patch(model)
        assert len(set(report.replaced.values())) == 6, str(report)
    return model


def main() -> None:
    torch.distributed.init_process_group("gloo")
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = torch.distributed.init_device_mesh("cpu", (world,))
    ids = tokens(2 * world)
    mine = ids.chunk(world)[rank]
    expected = run(make(), ids)
    for first in ("patch", "shard"):
        for mixed in (False, True):
            model, found = sharded(mesh, first, mixed), {}
            model.gradient_checkpointing_enable()
            assert attended(model, lambda model=model, found=found: found.update(run(model, mine))) == 3
            for name in [n for n in expected if n not in ("loss", "logits")]:
                tolerance = dict(atol=3e-3, rtol=0.1) if mixed else dict(atol=2e-5, rtol=1e-3)
                torch.testing.assert_close(gathered(found[name]), expected[name], **tolerance, msg=f"{first} {name}")
            loss = found["loss"].clone()
            torch.distributed.all_reduce(loss)
            torch.testing.assert_close(loss / world, expected["loss"], atol=1e-2 if mixed else 1e-5, rtol=0)
            logits = expected["logits"].chunk(world)[rank]
            assert (found["logits"].float() - logits).abs().max() < (0.1 if mixed else 1e-4)
    torch.distributed.destroy_process_group()
    print(f"rank {rank} of {world} agrees", file=sys.stderr)


if __name__ == "__main__":
    main()
