"""Many settings: the presets of run_batch_experiments.sh, one setting after the other or side by side.

May import every other room; nothing imports it. --help and --dry-run need only Python's own library.
"""
