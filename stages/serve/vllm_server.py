"""vLLM's own OpenAI server, as a process of its own, with what infer's engine gives vLLM.

It has its own endpoints, metrics and logs (https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stages.contract.errors import Exit
from stages.contract.records import BASE
from stages.contract.stop import StopRequest, die_with_parent
from stages.engines.vllm_options import AUTO_BATCH, AUTO_BATCH_ON_CPU, ENVIRONMENT, vllm_arguments
from stages.hardware.probe import probe
from stages.models.served_template import refuse_other_prompts, served_template
from stages.serve.address import answers, listening_socket, ready_line
from stages.serve.served import Say, Served

MODULE = "vllm.entrypoints.openai.api_server"
"""What `vllm serve` runs. The command itself fails in vLLM's CPU build (0.32), whose package has another name."""

PATIENCE = 20
"""Seconds that vLLM may take to end after a signal; then it is killed."""

CONNECTED = "base-with-connector"
"""Name of the weights that adapters with a trained connector are served on: vLLM serves these too."""

SAMPLES = 200
"""Test samples among which some are found to compare prompts with."""


def serve_by_vllm(
    served: Served, host: str, port: int, token: str | None, more: Sequence[str], say: Say, stop: StopRequest
) -> int:
    """Serve until a signal stops it. Returns the exit code: 0 after a signal, 1 if vLLM ended by itself.

    `more` are further options of `vllm serve`. Raises UsageError if the port is in use, or vLLM would render other
    prompts than training did; DoesNotFitError if the weights do not fit.
    """
    listening_socket(host, port).close()
    with tempfile.TemporaryDirectory(prefix="lorry-serve-") as folder:
        template = Path(folder) / "chat_template.jinja"
        template.write_text(served_template(served.renderer, served.weights[0].model, served.chat), encoding="utf-8")
        samples = served.samples("test", SAMPLES)
        compared = refuse_other_prompts(served.renderer, template.read_text(encoding="utf-8"), samples)
        say(f"chat template: vLLM renders {compared} prompts of the test samples as training does")
        command = vllm_command(served, template, host, port, say)
        process = subprocess.Popen(
            [*command, *more],
            env={**os.environ, **ENVIRONMENT, **({"VLLM_API_KEY": token} if token else {})},
            stdout=sys.stderr,
            process_group=0,
            preexec_fn=partial(die_with_parent, os.getpid()),  # noqa: PLW1509 - no other thread runs here
        )
        return _watch(process, host, port, served.names, say, stop)


def vllm_command(served: Served, template: Path, host: str, port: int, say: Say) -> list[str]:
    """The command line of vLLM's server for a run that one engine can serve. Raises DoesNotFitError if the weights do
    not fit."""
    (weights,) = served.weights
    gpus = probe().gpus
    settings = served.engine_settings(weights, say)
    memory = [(gpu.memory_free, gpu.memory_total) for gpu in gpus[: settings.tensor_parallel]] if gpus else None
    arguments = vllm_arguments(settings, AUTO_BATCH if gpus else AUTO_BATCH_ON_CPU, memory)
    name = BASE if weights.base else weights.merged or CONNECTED
    adapters = [json.dumps({"name": name, "path": str(folder)}) for name, folder in weights.adapters.items()]
    return [
        *(sys.executable, "-m", MODULE),
        *("--host", host, "--port", str(port), "--served-model-name", name),
        *("--chat-template", str(template), "--tokenizer-mode", "hf"),  # no other library renders
        *([] if served.reads_pictures else ["--chat-template-content-format", "string"]),
        # greedy answers are infer's, which does not read penalties in the model's folder
        *("--override-generation-config", json.dumps({"repetition_penalty": 1.0})),
        *(option for key, value in arguments.items() for option in _option(key, value)),
        *(["--lora-modules", *adapters] if adapters else []),
    ]


def _option(key: str, value: Any) -> list[str]:
    """An argument of vLLM's engine as an option of its command."""
    name = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        return [name] if value else []
    return [name, json.dumps(value) if isinstance(value, dict) else str(value)]


def _watch(
    process: subprocess.Popen[bytes], host: str, port: int, names: list[str], say: Say, stop: StopRequest
) -> int:
    """Wait for vLLM's end and say when it is ready. Stop signals are passed on to it. Returns the exit code."""
    stop.pass_on_to(process)
    ready, waited = False, 0
    while process.poll() is None:
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            if stop.signal is not None:
                waited += 1
                if waited > PATIENCE:
                    process.kill()
            elif not ready and answers(host, port):
                ready = True
                say(ready_line(host, port, names))
    stop.pass_on_to(None)
    if stop.signal is not None:
        say(f"stopped by {stop.signal.name}")
        return Exit.DONE
    say(f"vLLM ended with exit code {process.returncode}; see what it printed above")
    return Exit.CRASHED
