"""Every adapter trains under DistributedDataParallel, without find_unused_parameters unless it has stages."""

import os
import socket
import subprocess
import sys

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vfmadapt.build import names
from vfmadapt.testing import adapted, loss, perturb

rank, port = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)


STAGED = ("dv_lora",)  # a part rests in each stage


class Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return loss(self.model, image)


for name in names("adapter"):
    if name == "frozen":
        continue
    torch.manual_seed(0)
    model = adapted(name).train()
    perturb(model)
    wrapped = DistributedDataParallel(Loss(model), find_unused_parameters=name in STAGED)
    optimiser = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    torch.manual_seed(1 + rank)  # other images on each side
    for _ in range(2):  # the second forward fails if the first left a parameter out
        optimiser.zero_grad()
        wrapped(torch.randn(2, 3, 37, 52)).backward()
        optimiser.step()
    for key, tensor in model.adapters.named_parameters():
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.detach().contiguous())
        assert torch.equal(*both), f"{name}: {key} differs between the processes"
    print("trained", name, flush=True)
dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_end_with_equal_weights() -> None:
    from vfmadapt.build import names

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(rank), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [process.communicate(timeout=300) for process in processes]
    for process, (out, err) in zip(processes, found, strict=True):
        assert process.returncode == 0, f"{out}\n{err[-2000:]}"
        assert out.split().count("trained") == len(names("adapter")) - 1
