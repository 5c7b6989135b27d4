"""What everybody speaks: the flags, the result file and its types, metrics, statistics, verdicts, classes of failure,
and what is a secret.

Imports nothing else of this package, and everybody may import it. `config`, `text`, `values`, `packages`,
`kv_blocks`, `failures`, `files`, `secrets`, `signals`, `streams` and `statistics` need Python's own library alone,
because --help and a plan answer before anything is installed.
"""
