"""A run of tiny-llava that is ready for both phases: pictures of one colour each, captions and questions about them."""

import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from stages.contract.files import FileHashes, read_json, write_json, write_jsonl
from stages.contract.run import describe_output
from tests.conftest import Lorry, need_model
from tests.train.conftest import Training

COLOURS = ("red", "green", "blue", "yellow")

OVERRIDES = (
    *(
        "model.path=tiny-llava",
        "train.max_pixels=null",
        "train.target_modules=[all-linear]",
        "train.epochs=1",
        "train.rank=4",
    ),
    *("train.effective_batch=4", "train.log_every=1", "train.checkpoint_every=2"),
    "train.adapters=[{name: tuned, data: [questions]}]",
    *("infer.max_length=256", "infer.max_new_tokens=6", "infer.batch_size=4"),
)

CONNECTOR = "train.connector={data: [captions], effective_batch: 4, max_length: 256}"


def sample(name: str, source: str, number: int, answer: str) -> dict[str, Any]:
    said = {"user": f"<image>\nWhat is {name}? 这是什么？", "assistant": answer}
    return {
        "id": name,
        "messages": [{"role": role, "content": content} for role, content in said.items()],
        "images": [f"preprocess/pages/{COLOURS[number % len(COLOURS)]}.png"],
        "references": [answer],
        "meta": {"source": source},
    }


class TwoPhases(Training):
    """`lorry-train` on captions for the connector and questions for an adapter."""

    def __init__(self, lorry: Lorry, *overrides: str) -> None:
        need_model("tiny-llava")
        super().__init__(lorry, (*OVERRIDES, CONNECTOR, *overrides))

    def prepared(self, captions: int = 16, questions: int = 8) -> "TwoPhases":
        self.with_samples(1)  # a manifest in good order
        run = self.run
        for name in COLOURS:
            page = run.path("preprocess", "pages", f"{name}.png")
            page.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (80, 60), name).save(page)
        rows = [sample(f"caption{i}", "captions", i, f"A {COLOURS[i % 4]} square.") for i in range(captions)]
        rows += [sample(f"question{i}", "questions", i, COLOURS[i % 4]) for i in range(questions)]
        rows.append({**sample("text", "captions", 0, "No picture."), "images": []})
        rows[-1]["messages"][0]["content"] = "What is this?"
        samples = {"train": rows, "validation": [], "test": [sample(f"test{i}", "questions", i, "x") for i in range(3)]}
        for row in samples["test"]:
            del row["messages"][-1]
        for name, part in samples.items():
            write_jsonl(run.path("preprocess", "samples", f"{name}.jsonl"), part)
        asked = [
            {"idx": str(i), "ids": [row["id"]], "document": "a.pdf", "question": "?"}
            for i, row in enumerate(samples["test"])
        ]
        write_jsonl(run.path("preprocess", "asked.jsonl"), asked)
        self.describe()
        return self

    def describe(self) -> None:
        """Write what preprocess has made into its manifest."""
        run, folder = self.run, self.run.stage_folder("preprocess")
        names = [f"samples/{name}.jsonl" for name in ("train", "validation", "test")] + ["asked.jsonl", "pages/"]
        hashes = FileHashes(run.folder / "none")
        outputs = {name: describe_output(folder, name, None, hashes) for name in names}
        manifest = read_json(folder / "manifest.json") | {"key": run.key("preprocess", {}), "outputs": outputs}
        write_json(folder / "manifest.json", manifest)

    def copied(self, folder: Path, *overrides: str) -> "TwoPhases":
        """The same run with all that it has made, elsewhere and with other settings."""
        shutil.copytree(self.lorry.runs, folder / "runs")
        return TwoPhases(Lorry(self.lorry.data, self.lorry.models, folder / "runs"), *overrides)

    def done(self, *arguments: str, **environment: str) -> str:
        """Train, which must succeed. Returns what it said."""
        code, output = self(*arguments, **environment)
        log = self.run.path("train", "log.txt")
        assert code == 0, output + (log.read_text()[-3000:] if log.is_file() else "")
        return output

    @property
    def connector(self) -> Path:
        return self.run.path("train", "connector", "connector.safetensors")

    @property
    def adapter(self) -> Path:
        return self.run.path("train", "adapters", "tuned", "adapter_model.safetensors")


def two_phases(folder: Path, *overrides: str) -> TwoPhases:
    for name in ("data", "runs"):
        (folder / name).mkdir()
    return TwoPhases(Lorry(folder / "data", need_model("tiny-llava").parent, folder / "runs"), *overrides)
