"""Many settings: the presets of run_batch_experiments.sh, one setting after the other or side by side.

May import every other room; nobody imports it. --help and --dry-run need Python's own library alone.
"""
