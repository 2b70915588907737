"""The one typed configuration: schema, parsing and flattening. It imports the samplers' settings of the core alone."""

from ncsn.config.load import (
    changed_settings,
    continues,
    decay_begins,
    explain_changes,
    flatten,
    from_yaml,
    overrides_between,
    read_yaml,
    to_json,
    to_yaml,
    training_settings,
)
from ncsn.config.schema import Config
from ncsn.errors import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "changed_settings",
    "continues",
    "decay_begins",
    "explain_changes",
    "flatten",
    "from_yaml",
    "overrides_between",
    "read_yaml",
    "to_json",
    "to_yaml",
    "training_settings",
]
