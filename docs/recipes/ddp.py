"""Two processes, each with half of a batch, take the step that one process takes on the whole.

torchrun --nproc-per-node 2 ddp.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pyreg.functional import supcon_loss
from pyreg.optim import OrthoGrad


def step(model, features, labels, group):
    optimizer = OrthoGrad(model.parameters(), torch.optim.SGD, lr=0.1)
    loss = supcon_loss(model(features), labels, group=group)
    loss.backward()
    optimizer.step()
    return loss


def main():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    features, labels = torch.randn(64, 16), torch.randint(4, (64,))
    model, alone = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
    alone.load_state_dict(model.state_dict())

    parallel = DistributedDataParallel(model)
    loss = step(parallel, features[rank::ranks], labels[rank::ranks], group=True)

    torch.testing.assert_close(loss, step(alone, features, labels, group=None))
    torch.testing.assert_close(model.state_dict(), alone.state_dict())


dist.init_process_group("gloo")  # "nccl" on GPUs
main()
dist.destroy_process_group()
