"""The modules under test lie one folder up. Without a GPU, Triton's interpreter runs the kernels on the CPU."""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"         # before anything imports Triton
