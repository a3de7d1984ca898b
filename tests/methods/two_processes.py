"""One of the two processes of `test_two_processes`: a plain DDP loop over gloo. Writes its masks and weights."""

from __future__ import annotations

import sys

import torch
from torch import distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import sparse_lab
from tests.methods.loops import OPTIMIZERS, Watch, batches, made


def main(rank: int, method: str, where: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=2)
    network = made("cnn", seed=rank)  # DDP makes rank 0's weights everyone's
    wrapped = DistributedDataParallel(network)
    handle = sparse_lab.sparsify(
        wrapped, method, 0.9, total_steps=12, epochs=4, update_every=3 if method == "rigl" else 1, seed=rank
    )
    optimizer = OPTIMIZERS["momentum"](wrapped.parameters())
    handle.attach(optimizer)
    watch = Watch(handle, optimizer)
    for step, (images, labels) in enumerate(batches(12, seed=1 + rank)):
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(images), labels).backward()
        optimizer.step()
        watch(step, True)
    torch.save({"masks": watch.masks, "network": network.state_dict()}, f"{where}/{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
