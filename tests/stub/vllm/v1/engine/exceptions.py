class EngineDeadError(Exception):
    """The process of the engine has ended."""
