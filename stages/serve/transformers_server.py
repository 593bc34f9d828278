"""A server over the transformers engine, in this process."""

import socket
from typing import Any

import uvicorn

from stages.contract.files import read_json
from stages.contract.records import BASE
from stages.serve.address import listening_socket, ready_line
from stages.serve.loading import load_models
from stages.serve.openai_app import openai_app
from stages.serve.requests import Prompts
from stages.serve.served import BATCH, Say, Served
from stages.serve.worker import Worker

GENERATION = "generation_config.json"
"""The file of a model folder with its sampling settings, which vLLM's server takes for its defaults, too."""

GRACE = 3
"""Seconds that answers may still be sent after a signal."""


class _Server(uvicorn.Server):
    """A uvicorn server that says when it listens."""

    def __init__(self, config: uvicorn.Config, say: Say, line: str) -> None:
        super().__init__(config)
        self._say, self._line = say, line

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        self._say(self._line)


def serve_by_transformers(served: Served, host: str, port: int, token: str | None, say: Say) -> None:
    """Serve until a signal stops it, which also raises KeyboardInterrupt if a `StopRequest` is installed.

    Raises UsageError if the port is in use, and the errors of `start_engine`.
    """
    with listening_socket(host, port) as bound:
        models = load_models(served, say)
        size = served.run.recipe.infer.batch_size
        worker = Worker(models, BATCH if size == "auto" else size)
        try:
            model = served.weights[0].model
            sampling = read_json(model / GENERATION) or {}
            prompts = Prompts(served.renderer, served.max_length, served.max_pixels, sampling)
            app = openai_app(worker, prompts, model_entries(served), token)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)
            line = ready_line(host, bound.getsockname()[1], served.names)
            _Server(config, say, line).run(sockets=[bound])
        finally:
            worker.close()


def model_entries(served: Served) -> list[dict[str, Any]]:
    """The entries of /v1/models."""
    return [
        {
            "id": name,
            "root": str(weights.adapters.get(name, weights.model)),
            "parent": None if name == BASE else BASE,
            "max_model_len": served.max_length,
        }
        for weights in served.weights
        for name in weights.names
    ]
