"""`python -m tests.gpu.check_one NAME DEVICE FOLDER`: one part of the GPU check. Its last line has the figures."""

import os
import sys
from pathlib import Path

import torch

from tests.gpu.parts import PARTS

if __name__ == "__main__":
    part, device, folder = sys.argv[1:]
    Path(folder).mkdir()
    print(PARTS[part](torch.device(device), Path(folder)), flush=True)
    os._exit(0)  # past Python's teardown: now and then a thread of gloo's aborts there
