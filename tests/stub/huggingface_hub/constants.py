from huggingface_hub import HF_HUB_CACHE  # noqa: F401
