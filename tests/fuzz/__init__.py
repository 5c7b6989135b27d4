"""Random result files and random argument lists: what nobody thought of."""
