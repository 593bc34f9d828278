"""`lorry serve` with base and three adapters under many clients: speed, answers against infer's, and the end.

    LORRY_MODELS=... LORRY_RUNS=... python -m benchmarks.serving [MODEL] [--clients 64] [--engine vllm]

Makes a run of MODEL (default: SmolLM2-135M-Instruct, with its real weights) with three adapters of random weights, lets
the infer stage answer 100 prompts with each of the four, then asks the same greedily through `lorry serve` by parallel
clients, and then `vllm serve` itself, started with the same arguments. Greedy answers may differ where batches have
other sizes, as sums are in another order: each difference is in the row. Tokens are those of the answers.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.made_data import load_maker
from benchmarks.random_adapters import make_adapter
from benchmarks.rows import write_rows
from stages.contract.files import read_jsonl, write_jsonl
from stages.contract.run import Run
from stages.contract.stage import Stage
from stages.host.runner import run_stage
from stages.host.runs import open_run
from stages.host.work import run_work
from stages.serve.served import served_run
from stages.serve.vllm_server import vllm_command

MODEL, NAME, TOKEN = "SmolLM2-135M-Instruct", "serving", "benchmark"
ADAPTERS, PROMPTS, NEW_TOKENS = ("one", "two", "three"), 100, 64
MODELS = ("base", *ADAPTERS)


def make_run(model: str, engine: str) -> Run:
    """The run, with test samples and adapters as if preprocess and train had made them, and infer's real answers."""
    names = ", ".join(f"{{name: {name}}}" for name in ADAPTERS)
    limits = (f"infer.max_new_tokens={NEW_TOKENS}", "infer.max_length=1024", f"infer.engine={engine}")
    data = str(Path("recipes/data/chat").absolute())
    overrides = (f"model.path={model}", f"train.adapters=[{names}]", "train.rank=16", "infer.losses=false", *limits)
    run = open_run("chat", "tiny", data, overrides, NAME)

    def write_samples(stage: Stage) -> None:
        """Write questions about lamps that are all different."""
        maker = load_maker("chat")
        asked = [one["messages"][:2] for seed in range(2) for one in maker.shop(random.Random(seed))]
        samples = [
            {
                "id": f"lamp/{number}",
                "messages": messages,
                "images": [],
                "references": ["x"],
                "meta": {"source": "lamp", "group": str(number)},
            }
            for number, messages in enumerate(asked[:PROMPTS])
        ]
        answer = {"role": "assistant", "content": "x"}
        learnt = [{**one, "messages": [*one["messages"], answer]} for one in samples[:4]]  # type: ignore[list-item]
        for split, rows in (("train", learnt), ("validation", learnt[:1]), ("test", samples)):
            stage.outputs[f"samples/{split}.jsonl"] = write_jsonl(stage.path("samples", f"{split}.jsonl"), rows)
        stage.outputs["asked.jsonl"] = write_jsonl(
            stage.path("asked.jsonl"), [{"ids": [one["id"]], "id": one["id"]} for one in samples]
        )

    def write_adapters(stage: Stage) -> None:
        """Write adapters of random weights."""
        for seed, name in enumerate(ADAPTERS):
            make_adapter(stage.path("adapters", name), run.roots.models / model, 16, seed)
            stage.outputs[f"adapters/{name}/"] = None

    for stage, work in (("preprocess", write_samples), ("train", write_adapters), ("infer", run_work)):
        if run_stage(run, stage, work):
            raise SystemExit(f"{stage} failed; see the message above")
    return run


async def ask_all(address: str, run: Run, clients: int) -> tuple[dict[tuple[str, str], str], int, float]:
    """Ask each model each prompt, `clients` at a time. Returns the answers, their tokens, and the seconds."""
    samples = list(read_jsonl(run.path("preprocess", "samples", "test.jsonl")))
    free, answers, tokens = asyncio.Semaphore(clients), {}, 0
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=600, limits=limits, headers={"Authorization": f"Bearer {TOKEN}"}) as client:

        async def ask(name: str, sample: dict[str, Any]) -> None:
            nonlocal tokens
            asked = {"model": name, "messages": sample["messages"], "temperature": 0, "max_tokens": NEW_TOKENS}
            async with free:
                response = await client.post(f"{address}/v1/chat/completions", json=asked)
            response.raise_for_status()
            found = response.json()
            answers[name, sample["id"]] = found["choices"][0]["message"]["content"]
            tokens += found["usage"]["completion_tokens"]

        await ask("base", samples[0])  # what the first request compiles is no part of the speed
        tokens, began = 0, time.monotonic()
        await asyncio.gather(*(ask(name, sample) for sample in samples for name in MODELS))
        return answers, tokens, time.monotonic() - began


def measure(command: Sequence[str], port: int, run: Run, clients: int, environment: dict[str, str]) -> dict[str, Any]:
    """Start a server, ask it, and stop it by SIGTERM. Returns a row, with the answers."""
    address, began = f"http://127.0.0.1:{port}", time.monotonic()
    server = subprocess.Popen(command, env={**os.environ, **environment}, stdout=sys.stderr)
    try:
        while True:
            try:
                if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}")
            time.sleep(0.5)
        started = time.monotonic() - began
        answers, tokens, seconds = asyncio.run(ask_all(address, run, clients))
    finally:
        stopped = time.monotonic()
        server.send_signal(signal.SIGTERM)
        code = server.wait(120)
    return {
        "seconds until it answers": round(started, 1),
        "tokens/s": round(tokens / seconds, 1),
        "requests/s": round(len(answers) / seconds, 1),
        "exit code after SIGTERM": code,
        "seconds to end": round(time.monotonic() - stopped, 1),
        "answers": answers,
    }


def differences(run: Run, answers: dict[tuple[str, str], str]) -> list[dict[str, str]]:
    """The answers that differ from infer's, with both."""
    found = []
    for name in MODELS:
        for row in read_jsonl(run.path("infer", "predictions", f"{name}.jsonl")):
            served = answers[name, row["id"]]
            if served != row["text"]:
                found.append({"model": name, "id": row["id"], "infer": row["text"], "served": served})
    return found


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main() -> None:
    """Measure both servers, and write a row for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default=MODEL)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--engine", default="vllm")
    options = parser.parse_args()
    os.environ["LORRY_API_KEY"] = os.environ["VLLM_API_KEY"] = TOKEN
    run = make_run(options.model, options.engine)
    code = "from entrypoints.serve import main; main()"
    port = free_port()
    words = ("--run", NAME, "--port", str(port), "--engine", options.engine)
    commands = {"lorry serve": (port, [sys.executable, "-c", code, *words], dict[str, str]())}
    if options.engine == "vllm":
        port = free_port()
        served = served_run(run, "vllm", None, None, print)
        template = run.path("serving.jinja")
        template.write_text(served.renderer.template.source, encoding="utf-8")
        commands["vllm serve itself"] = port, vllm_command(served, template, "127.0.0.1", port, print), {}
    rows = []
    for name, (place, command, environment) in commands.items():
        row = {"server": name, "engine": options.engine, "clients": options.clients}
        row |= measure(command, place, run, options.clients, environment)
        differ = differences(run, row.pop("answers"))
        rows.append({**row, "equal to infer": f"{len(MODELS) * PROMPTS - len(differ)} of {len(MODELS) * PROMPTS}"})
        rows[-1]["differences"] = differ
        print(json.dumps({**rows[-1], "differences": differ[:5]}, ensure_ascii=False), flush=True)
    write_rows("serving", rows, f"python -m benchmarks.serving {' '.join(sys.argv[1:])}".strip(), by="server")


if __name__ == "__main__":
    main()
