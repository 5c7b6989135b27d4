"""A model's config.json with something wrong: a plan says what it can, or refuses it in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from batch_inference.core.config import ConfigError
from batch_inference.core.flags import parse_flags
from batch_inference.core.text import has_control
from batch_inference.plan.devices import Devices
from batch_inference.plan.model import read_model_facts
from batch_inference.plan.printed import setting_plan
from conftest import REPOSITORY
from fuzz.mutations import mutated
from fuzz.tries import NUMBERS, told

FILES_OF_A_TRY = 20
CONFIGS = ("models/*/config.json", "tests/plan_truth/*/config.json")
MODELS = [json.loads(path.read_text()) for names in CONFIGS for path in sorted(REPOSITORY.glob(names))]


@pytest.mark.parametrize("number", NUMBERS)
def test_each_model_is_planned_or_refused(number: int, tmp_path: Path) -> None:
    rng = random.Random(f"models {number}")
    config, _ = parse_flags(["--model", str(tmp_path), "-tp", "2", "-pp", "2", "--dry-run"])
    devices = Devices("gpu", tuple("0123"))
    for _ in range(FILES_OF_A_TRY):
        data, done = mutated(rng.choice(MODELS), rng)
        (tmp_path / "config.json").write_bytes(data)
        with told(number, done):
            try:
                said = "".join(setting_plan(config, read_model_facts(config.model), devices, 80.0))
            except ConfigError as error:
                said = str(error)
            assert not has_control(said)
            assert said
