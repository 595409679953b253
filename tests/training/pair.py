"""Several trainings in one pair of processes: to start the processes takes longer than to train.

    torchrun --nproc_per_node=2 -m tests.training.pair JOBS.json

JOBS.json holds lists of words: train.py's flags; or "gradients", a folder with a model, a file of
samples and one for the gradients that the pair finds together.
"""
import json
import sys
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
import train
from ccra import VLM
from core import distributed


def gradients(model: str, samples: str, out: str) -> None:
    """Of DDP's first process, accumulated: 3 + 1 rows, and 3 + one that doesn't count."""
    rank, size, cpu = distributed.join("cpu", threads=1)
    vlm = VLM.from_pretrained(model, dtype=torch.float32)
    trained = train.freeze(vlm, 2)
    rows = torch.load(samples, weights_only=True)
    share, counting = train.pieces(rows, rank, size, 3)
    batches = [data.make_batch(part) for part in share]
    train.train_step(DistributedDataParallel(vlm), batches, cpu, torch.float32, counting=counting)
    if rank == 0:
        torch.save({name: p.grad for name, p in trained.items()}, out)
    distributed.leave()


def main() -> None:
    store, rank, size = next(dist.rendezvous("env://"))
    rooms = (dist.PrefixStore(f"job {i}", store) for i in count())
    init = dist.init_process_group

    def meet(backend: str) -> None:
        """Each group in a room of its own: the second would find the first one's addresses."""
        init(backend, store=next(rooms), rank=rank, world_size=size)

    dist.init_process_group = meet
    for words in json.loads(Path(sys.argv[1]).read_text()):
        if words[0] == "gradients":
            gradients(*words[1:])
        else:
            train.main(words)


if __name__ == "__main__":
    main()
