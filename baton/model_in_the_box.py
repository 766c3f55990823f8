"""Which model is served where none is named: the one that comes with Baton."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from baton.config import ModelConfig
from baton.errors import ConfigError

DIRECTORY = Path(__file__).resolve().parent.parent / "demo_model" / "checkpoint"
SERVED_NAME = "baton-tiny"


def resolve(config: ModelConfig) -> ModelConfig:
    """`config`, with the model in the box put in where it names none. Raises ConfigError where there is none either."""
    if config.model:
        return config
    if not (DIRECTORY / "config.json").is_file():
        raise ConfigError(
            "no --model was given, and this installation has no model in the box; give --model a Hugging Face "
            "directory or hub id"
        )
    return replace(config, model=str(DIRECTORY), served_model_name=config.served_model_name or SERVED_NAME)
