"""A module of the launcher's (overview, packing) on a machine with DEVICES GPUs (8 where nothing is said)."""

import os
import sys
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batch_inference.plan import devices

if __name__ == "__main__":
    devices._gpu_ids = lambda: tuple(map(str, range(int(os.environ.get("DEVICES", "8")))))
    module, *words = sys.argv[1:]
    sys.exit(import_module(module).main(words))
