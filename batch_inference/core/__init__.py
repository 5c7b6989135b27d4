"""What everybody speaks: the flags, the result file and its types, metrics, statistics, verdicts, classes of failure,
and what is a secret.

Imports nothing else of this package, and everybody may import it. `child`, `config`, `errors`, `failures`, `files`,
`installed_vllm`, `kv_blocks`, `packages`, `parser`, `secrets`, `signals`, `statistics`, `streams`, `text` and `values`
need Python's own library alone, because --help and a plan answer before anything is installed.
"""
