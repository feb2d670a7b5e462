"""Models of transformers that are not to be had, by the name on the Hub or the folder that they have in a config."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError

from kd_accel.schema import ConfigError, one_line

# What transformers raises for a name or folder without a model, and for one that it cannot read.
NOT_TO_BE_HAD = (OSError, ValueError, RuntimeError, KeyError, ImportError, StrictDataclassError)


def unavailable(what: str, where: str, error: Exception) -> ConfigError:
    """What to raise from one of NOT_TO_BE_HAD: `what` names it ("the model 'org/name'"), `where` begins the line."""
    return ConfigError(
        f"{where}: {what} cannot be had: fix the name or the network, or name a folder on this machine"
        f" ({one_line(error)})"
    )
