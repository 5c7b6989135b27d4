"""What all rooms share: the flags, the result file and its types, metrics, statistics, verdicts, classes of failure,
and the handling of secrets.

Imports nothing else from this package; every room may import it. `child`, `config`, `errors`, `failures`, `files`,
`installed_vllm`, `kv_blocks`, `packages`, `parser`, `secrets`, `signals`, `statistics`, `streams`, `text` and `values`
need only Python's own library, because --help and plans work before anything is installed.
"""
