"""A stand-in for Ray: a cluster with STUB_RAY_GPUS GPUs, or none that answers."""

import os


def init(address, logging_level, log_to_driver):
    if "STUB_RAY_GPUS" not in os.environ:
        raise ConnectionError(f"nothing at {address}")


def cluster_resources():
    return {"CPU": 8.0, "GPU": float(os.environ["STUB_RAY_GPUS"])}


def shutdown():
    pass
