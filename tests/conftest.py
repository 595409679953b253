"""Shared by all tests: the flat modules of the root on the path, and a fixed number of threads (for rounding)."""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)
