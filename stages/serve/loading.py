"""Loads a run's engines."""

import os

from stages.engines import start_engine
from stages.engines.engine import Engine
from stages.serve.served import Say, Served

Loaded = tuple[Engine, str | None]
"""An engine and the adapter in it; None: the base."""


def load_models(served: Served, say: Say) -> dict[str, Loaded]:
    """The engines of a run, loaded, by the names of the models that they answer with.

    Raises the errors of `start_engine` and DoesNotFitError if the weights do not fit.
    """
    from transformers.utils.logging import disable_progress_bar

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # its lines would stand among those of a chat
    found: dict[str, Loaded] = {}
    for weights in served.weights:
        engine = start_engine(served.kind.name, served.engine_settings(weights, say))
        found |= {name: (engine, name if name in weights.adapters else None) for name in weights.names}
    return found
