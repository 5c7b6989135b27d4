class VLLMValidationError(Exception):
    """A request that vLLM refuses. Since 0.28 it is no ValueError."""
