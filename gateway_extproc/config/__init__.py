"""The configuration: one YAML file, and environment variables over it, read into one frozen value.

Owns the schema, the reading of the file, the checks of each value and across values, and the printing of what is in
force. Promises that an accepted configuration is wholly enforced: an unknown key, or a setting that a later version
will have, is an error; that every problem found is reported at once with its line; that no message, ``repr`` or print
shows a secret; and that any input, however hostile, ends in a Config or a ConfigError within named bounds. Leaves out
watching the file for changes (app.py) and the documentation made from the schema (config_reference.py).

After loading, durations are seconds (float), sizes are bytes (int), ``*_file`` paths are absolute, addresses are in
canonical form, and secrets that were named by ``*_file`` stand in the field without ``_file``.

The modules, each knowing only those before it: problems (how mistakes are told), forms (what one value may be), part
(what a section is), schema (which sections there are), source (YAML with lines), environment (variables), checks
(values together), reader (all of it, to a Config).
"""

from __future__ import annotations

from .following import follow
from .part import effective_yaml, masked
from .problems import ConfigError
from .reader import load, parse, part_of, user_of
from .schema import (
    Config,
    ControllerConfig,
    KubernetesDiscovery,
    Listen,
    PodConfig,
    PodTls,
    PriceConfig,
    StoreConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "ControllerConfig",
    "KubernetesDiscovery",
    "Listen",
    "PodConfig",
    "PodTls",
    "PriceConfig",
    "StoreConfig",
    "effective_yaml",
    "follow",
    "load",
    "masked",
    "parse",
    "part_of",
    "user_of",
]
