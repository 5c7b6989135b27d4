"""The launcher on a machine with DEVICES GPUs (8 where nothing is said)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batch_inference.launch.__main__ import main
from batch_inference.plan import devices

if __name__ == "__main__":
    devices._gpu_ids = lambda: tuple(map(str, range(int(os.environ.get("DEVICES", "8")))))
    sys.exit(main(sys.argv[1:]))
