"""train.py, but a checkpoint's files lie there in half for a tenth of a second. (A tiny model's are
written so fast that a kill would hardly ever hit the writing.)

    python -m tests.training.slowly --stage 1 ...
"""
import time
from pathlib import Path

from torch import Tensor

import train
from core.weights import write_tensors
from training import checkpoints


def slowly(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    write_tensors(path, tensors, metadata)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    time.sleep(0.1)
    path.write_bytes(content)


if __name__ == "__main__":
    checkpoints.write_tensors = slowly
    train.main()
