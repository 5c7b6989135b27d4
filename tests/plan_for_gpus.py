"""batch_inference.overview on a machine with DEVICES GPUs (8 where nothing is said)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batch_inference import hardware, overview

if __name__ == "__main__":
    hardware._gpu_ids = lambda: tuple(map(str, range(int(os.environ.get("DEVICES", "8")))))
    sys.exit(overview.main(sys.argv[1:]))
