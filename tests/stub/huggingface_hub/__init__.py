"""A hub with one model. STUB_HUB: a folder that keeps what it was asked; FAIL in it: the error it answers with."""

import os
from pathlib import Path
from types import SimpleNamespace

HUB = Path(os.environ.get("STUB_HUB", "/no/such/folder"))
HF_HUB_CACHE = str(HUB / "cache")


class GatedRepoError(OSError):
    pass


class RepositoryNotFoundError(OSError):
    pass


class ConnectError(Exception):
    pass


def _files():
    size = int((HUB / "SIZE").read_text()) if (HUB / "SIZE").exists() else 10
    names = ["config.json", "model-1.safetensors", "pytorch_model.bin", "original/consolidated.safetensors"]
    return [SimpleNamespace(rfilename=name, size=size, blob_id=f"blob-{name}", lfs=None) for name in names]


def _answer(question):
    with (HUB / "asked").open("a") as file:
        file.write(f"{question}\n")
    if (HUB / "FAIL").exists():
        fail = (HUB / "FAIL").read_text()
        text = "Name or service not known" if fail == "ConnectError" else "401 Client Error.\nmore lines"
        raise globals()[fail](text)


class HfApi:
    def model_info(self, repo_id, *, revision=None, timeout=None, files_metadata=False):
        assert files_metadata
        _answer(f"look {repo_id} {revision} {os.environ.get('HF_TOKEN')}")
        return SimpleNamespace(siblings=_files())


def snapshot_download(repo_id, *, revision=None, cache_dir=None, allow_patterns=None, local_files_only=False):
    folder = Path(cache_dir or HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}" / "blobs"
    if local_files_only:
        if not folder.exists():
            raise FileNotFoundError("not in the cache")
        return str(folder)
    _answer(f"fetch {repo_id} {' '.join(allow_patterns)}")
    folder.mkdir(parents=True)
    for file in _files():
        if file.rfilename in allow_patterns:
            (folder / file.blob_id).touch()
    return str(folder)
