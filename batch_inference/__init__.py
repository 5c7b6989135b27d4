"""Sweeps batch size and sequence length of offline vLLM inference over TP, PP and DP settings."""
