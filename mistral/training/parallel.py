"""One process or many: the process group, FSDP2 over it, and weights that do not depend on how many there are."""

import datetime
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from .loss import Trainee

INIT_STD = 0.02


class World:
    """The processes of a run.

    Attributes:
        rank, size: of this process and of all; 0 and 1 without torchrun.
        device: of this process.
        mesh: over all processes; None until `make_mesh`.
    """

    def __init__(self, device: str = "auto"):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no GPU here; set device to cpu")
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"device is {kind!r}; it must be auto, cpu or cuda")
        self.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else "cpu")
        self.mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def start(self, alone: bool = False) -> None:
        """Joins the other processes; `alone` makes a group of one as well, which FSDP needs."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size == 1 and not alone:
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=30)
        if dist.is_initialized():
            pass  # by the caller, or by an earlier run in this process: torchrun's store serves one group
        elif self.size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        else:
            dist.init_process_group(backend, timeout=timeout)
        self.mesh = init_device_mesh(self.device.type, (self.size,))

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first process runs the block alone, and then the others; they fail too where it fails."""
        if self.size == 1:
            yield
            return
        failed = torch.zeros((), device=self.device)
        if self.first:
            try:
                yield
            except BaseException:
                failed.fill_(1)
                raise
            finally:
                dist.all_reduce(failed)
        else:
            dist.all_reduce(failed)
            if failed.item():
                raise ValueError("the first process failed; its error says why")
            yield


def shard(
    trainee: Trainee, mesh: DeviceMesh, dtype: torch.dtype | None, ignored: set[nn.Parameter] | None = None
) -> None:
    """FSDP2 (ZeRO-3) over the layers and, around them, the embedding, the last norm and the output projection.

    Args:
        trainee: changed in place; make the optimizer afterwards.
        mesh: of one dimension.
        dtype: that parameters are gathered and computed in; None keeps theirs. Gradients are reduced in float32.
        ignored: parameters that each process keeps whole.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*trainee.model.layers, trainee):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=ignored)
    for module in trainee.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the labels of all processes: gradients add up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def is_sharded(trainee: nn.Module) -> bool:
    return isinstance(trainee, FSDPModule)


def set_last(trainee: nn.Module, last: bool) -> None:
    """Reduces gradients over the processes in the last micro-batch of a step only."""
    if isinstance(trainee, FSDPModule):
        trainee.set_requires_gradient_sync(last)


def assign(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Writes a whole tensor, which every process has, into a parameter that may be sharded; no communication."""
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            whole = whole.to(parameter.device)
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))
        else:
            parameter.copy_(whole)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, gathered where it is sharded: a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def initialise(trainee: Trainee, seed: int) -> None:
    """New weights, the same for any number of processes: each is drawn from a generator of its own name.

    Normal with a deviation of 0.02, that of the projections into the residual stream divided by sqrt(2 layers)
    (GPT-2's scheme, which Llama's and Mistral's training code share); norms are 1 and biases 0.
    """
    depth = (2 * trainee.model.config.n_layers) ** -0.5
    for name, parameter in trainee.model.named_parameters():
        if name.endswith("norm.weight"):
            value = torch.ones(parameter.shape)
        elif name.endswith(".bias"):
            value = torch.zeros(parameter.shape)
        else:
            device = parameter.device
            generator = torch.Generator(device).manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
            value = torch.empty(parameter.shape, device=device).normal_(0.0, INIT_STD, generator=generator)
            if name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
                value *= depth
        assign(parameter, value)
