"""`lorry tune`, `chat` and `serve` on files of conversations in five forms, and ms-swift's own command beside them.

    python -m benchmarks.tune [MODEL] [FORM...]

Needs a CPU, and MODEL (default: SmolLM2-135M-Instruct) below LORRY_MODELS. The files are those of
recipes/data/make_chat.py, more of them and in other forms. `swift sft` gets the training samples of each run, which are
in its own format, and the same values. Losses are those of a token of the answers held out, in nats, of base, Lorry's
adapter and ms-swift's, all computed by transformers and PEFT alone on the same tokens.
"""

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.made_data import load_maker
from benchmarks.rows import write_rows
from stages.contract.files import read_json, read_jsonl
from stages.contract.roots import Roots

MODEL = "SmolLM2-135M-Instruct"
TEMPLATE = ("llama", "chatml")
"""ms-swift's names of MODEL's type and template, which its command needs."""

Messages = list[dict[str, str]]


# -- files ---------------------------------------------------------------------------------------------------------


def conversations() -> list[Messages]:
    """Conversations with several turns and code, as messages."""
    maker = load_maker("chat")
    return [one["messages"] for one in maker.shop(random.Random(1))]


def write_messages(folder: Path) -> Path:
    """OpenAI's messages, as JSON Lines."""
    path = folder / "messages.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations()), encoding="utf-8")
    return path


def write_sharegpt(folder: Path) -> Path:
    """ShareGPT, as one JSON array."""
    names = {"user": "human", "assistant": "gpt"}
    found = [
        {
            "system": one[0]["content"],
            "conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in one[1:]],
        }
        for one in conversations()
    ]
    path = folder / "sharegpt.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def write_alpaca(folder: Path) -> Path:
    """Alpaca in Chinese, as one JSON array."""
    rows = load_maker("chat").shop_in_chinese(random.Random(1))
    found = [dict(zip(("instruction", "input", "output"), row, strict=True)) for row in rows]
    path = folder / "alpaca.json"
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return path


def write_csv(folder: Path) -> Path:
    """Prompts and completions, as CSV with line breaks in its cells."""
    path = folder / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["prompt", "completion"])
        for one in conversations():
            table.writerow([f"{one[0]['content']}\n\n{one[1]['content']}", one[2]["content"]])
    return path


def write_parquet(folder: Path) -> Path:
    """Messages in a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    path = folder / "messages.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": one} for one in conversations()]), path)
    return path


FORMS: dict[str, Callable[[Path], Path]] = {
    "messages": write_messages,
    "sharegpt": write_sharegpt,
    "alpaca": write_alpaca,
    "csv": write_csv,
    "parquet": write_parquet,
}


# -- Lorry ---------------------------------------------------------------------------------------------------------


def lorry(*words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run the command `lorry`."""
    code = "from entrypoints.lorry import main; main()"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, **options)


def tune(file: Path, model: str, run: str, folder: Path) -> dict[str, Any]:
    """Tune a model on a file by one command. Returns a row."""
    began = time.time()
    done = lorry("tune", str(file), "--model", model, "--run", run, cwd=folder)
    seconds = time.time() - began
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    stage = Roots.from_environment().runs / run / "train"
    first = next(one["time"] for one in read_jsonl(stage / "events.jsonl") if one["event"] == "loss")
    return {
        "said": next(line for line in (done.stderr + done.stdout).splitlines() if "conversations" in line),
        "seconds to the first step": round(first - began, 1),
        "seconds to train": read_json(stage / "manifest.json")["seconds"],
        "seconds in all": round(seconds, 1),
    }


def chat(run: str, question: str) -> list[str]:
    """The lines that `lorry chat` prints for a question."""
    done = lorry("chat", run, "--tuned-only", input=question + "\n")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()


def serve(run: str, question: str) -> dict[str, Any]:
    """Serve a run, ask the adapter one question, and stop the server. Returns a row."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    code = "from entrypoints.lorry import main; main()"
    began = time.time()
    server = subprocess.Popen([sys.executable, "-c", code, "serve", run, "--port", address.rpartition(":")[2]])
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        ready = time.time() - began
        asked = {"model": "tuned", "messages": [{"role": "user", "content": question}], "max_tokens": 32}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('LORRY_API_KEY', '')}"}
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(asked).encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
    finally:
        server.send_signal(signal.SIGTERM)
        ended = server.wait(60)
    return {"seconds until it answers": round(ready, 1), "served answer": answer, "exit code of the server": ended}


# -- ms-swift ------------------------------------------------------------------------------------------------------


def swift(run: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """Train on the same samples with the same values by ms-swift's command. Returns a row and the adapter's folder."""
    roots = Roots.from_environment()
    recipe = read_json_of_yaml(roots.runs / run / "recipe.yaml")
    train, out = recipe["train"], folder / "swift"
    samples = folder / "train.jsonl"
    with samples.open("w", encoding="utf-8") as file:
        for one in read_jsonl(roots.runs / run / "preprocess" / "samples" / "train.jsonl"):
            file.write(json.dumps({"messages": one["messages"]}, ensure_ascii=False) + "\n")
    values = {
        "model": roots.models / recipe["model"]["path"],
        "model_type": TEMPLATE[0],
        "template": TEMPLATE[1],
        "dataset": samples,
        "split_dataset_ratio": 0,
        "tuner_type": "lora",
        "lora_rank": train["rank"],
        "lora_alpha": train["alpha"],
        "lora_dropout": train["dropout"],
        "target_modules": "all-linear",
        "learning_rate": train["learning_rate"],
        "num_train_epochs": train["epochs"],
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": train["effective_batch"],
        "max_length": train["max_length"],
        "torch_dtype": "float32",
        "logging_steps": 1,
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "report_to": "none",
        "add_version": "false",
        "output_dir": out,
    }
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    began = time.time()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with (folder / "swift.log").open("w") as log:
        command = [sys.executable, "-m", "swift.cli.sft", *words]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        first = None
        while process.poll() is None:
            if first is None and (out / "logging.jsonl").is_file() and (out / "logging.jsonl").stat().st_size:
                first = time.time() - began
            time.sleep(0.1)
    assert process.returncode == 0, (folder / "swift.log").read_text()[-2000:]
    row = {
        "swift: seconds to the first step": first and round(first, 1),
        "swift: seconds in all": round(time.time() - began, 1),
    }
    return row, max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def read_json_of_yaml(path: Path) -> Any:
    """The content of a YAML file."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


# -- losses --------------------------------------------------------------------------------------------------------


def held_out_losses(run: str, adapters: dict[str, Path]) -> dict[str, float]:
    """The mean loss of a token of the held-out answers, in nats, of base and of adapters, by PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from stages.models.rendering import UNLEARNT, Renderer

    roots = Roots.from_environment()
    recipe = read_json_of_yaml(roots.runs / run / "recipe.yaml")
    model = roots.models / recipe["model"]["path"]
    renderer = Renderer(model)
    rows = list(read_jsonl(roots.runs / run / "preprocess" / "samples" / "test.jsonl"))
    found = [one for row in rows for one in renderer.training_sequences([*row["messages"], row["meta"]["answer"]])]

    def mean_loss(net: Any) -> float:
        total = count = 0.0
        for one in found:
            labels = torch.tensor([one.labels])
            with torch.no_grad():
                logits = net(input_ids=torch.tensor([one.tokens])).logits[0, :-1].float()
            cross_entropy = torch.nn.functional.cross_entropy
            total += float(cross_entropy(logits, labels[0, 1:], ignore_index=UNLEARNT, reduction="sum"))
            count += int((labels[0, 1:] != UNLEARNT).sum())
        return round(total / count, 4)

    losses = {}
    for name, folder in {"base": None, **adapters}.items():
        net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
        losses[name] = mean_loss(PeftModel.from_pretrained(net, folder) if folder else net)
    return losses


def main() -> None:
    """Measure the forms that the command line names, or all, and write a row for each."""
    model, *forms = sys.argv[1:] or [MODEL]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("LORRY_TARGET", "cpu")
    rows = []
    for form in forms or FORMS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run = f"tune-{form}"
            row = {"form": form, **tune(FORMS[form](folder), model, run, folder)}
            (test,) = list(read_jsonl(Roots.from_environment().runs / run / "preprocess/samples/test.jsonl"))[:1]
            question = next(one["content"] for one in test["messages"] if one["role"] == "user")
            row["chat"] = chat(run, question.replace("\n", " "))
            row |= serve(run, question)
            more, adapter = swift(run, folder)
            own = Roots.from_environment().runs / run / "train" / "adapters" / "tuned"
            row |= {**more, "held-out loss": held_out_losses(run, {"Lorry": own, "ms-swift": adapter})}
            rows.append(row)
            print(json.dumps(row, ensure_ascii=False), flush=True)
    write_rows("tune", rows, f"python -m benchmarks.tune {' '.join(sys.argv[1:])}".strip(), by="form")


if __name__ == "__main__":
    main()
