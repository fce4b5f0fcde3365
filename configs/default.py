"""The defaults of every section as a ConfigDict; every recipe starts from it."""

import dataclasses

from ml_collections import ConfigDict

from trainer.config import Config


def get_config() -> ConfigDict:
    return ConfigDict(dataclasses.asdict(Config()), convert_dict=True)
