from types import SimpleNamespace

from vllm.engine.arg_utils import LACKS

if LACKS != "compilation_counter":
    compilation_counter = SimpleNamespace()
