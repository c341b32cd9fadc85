"""Two processes, each with half of a model's classes and parameters and of a cloud's points, compute what one does.

torchrun --nproc-per-node 2 shards.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pyreg.functional import sinkhorn_points, stablemax_cross_entropy
from pyreg.optim import OrthoGrad


def head_of_divided_classes(rank, ranks):
    hidden, weight, target = torch.randn(64, 32), torch.randn(1000, 32), torch.randint(1000, (64,))
    own = weight.chunk(ranks)[rank].clone().requires_grad_()
    loss = stablemax_cross_entropy(hidden @ own.T, target, group=True, num_classes=1000)
    loss.backward()  # own.grad; that of hidden, where it is asked for, is a sum over ranks that is left to do

    whole = weight.clone().requires_grad_()
    expected = stablemax_cross_entropy(hidden @ whole.T, target)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(own.grad, whole.grad.chunk(ranks)[rank])


def model_of_divided_parameters(rank, ranks):
    def step(model, inputs):
        optimizer = OrthoGrad(model.parameters(), torch.optim.AdamW, lr=1e-2)
        model(inputs).square().mean().backward()
        optimizer.step()

    inputs, model, alone = torch.randn(64, 32), torch.nn.Linear(32, 16), torch.nn.Linear(32, 16)
    alone.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    step(model, inputs[rank::ranks])
    step(alone, inputs)
    torch.testing.assert_close(model.weight.full_tensor(), alone.weight)


def transport_of_divided_rows(rank, ranks):
    x, y = torch.randn(300, 3), torch.randn(200, 3) + 1
    own = x.chunk(ranks)[rank].clone().requires_grad_()
    value = sinkhorn_points(own, y, epsilon=0.1, group=True).value
    value.backward()

    x.requires_grad_()
    expected = sinkhorn_points(x, y, epsilon=0.1).value
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(own.grad, x.grad.chunk(ranks)[rank], rtol=1e-3, atol=1e-6)


dist.init_process_group("gloo")  # "nccl" on GPUs
torch.manual_seed(0)
for compare in (head_of_divided_classes, model_of_divided_parameters, transport_of_divided_rows):
    compare(dist.get_rank(), dist.get_world_size())
dist.destroy_process_group()
