"""The launcher on a machine with DEVICES GPUs (8 where nothing is said), whose nodes meet unless MEETING is said."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batch_inference.launch.__main__ import main
from batch_inference.measure import nodes
from batch_inference.plan import devices


def meet(*_: object) -> dict[str, str]:
    if "MEETING" in os.environ:
        raise nodes.NodesError("the planted reason")
    return {"GLOO_SOCKET_IFNAME": "eth7"}


if __name__ == "__main__":
    devices._gpu_ids = lambda: tuple(map(str, range(int(os.environ.get("DEVICES", "8")))))
    nodes.meet_before_torchrun = meet
    sys.exit(main(sys.argv[1:]))
