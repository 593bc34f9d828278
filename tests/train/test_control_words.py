"""A training whose samples say control words of the model, and some of which are too long."""

from typing import Any

from stages.contract.files import FileHashes, read_json, read_jsonl, write_json, write_jsonl
from stages.contract.run import describe_output
from tests.train.conftest import Training


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_what_samples_say_is_counted_and_reported(training: Training) -> None:
    training.overrides += ("train.too_long=cut", "train.max_length=64")
    run, name = training.with_samples(6).run, "samples/train.jsonl"
    samples = read_jsonl(run.path("preprocess", name))
    samples[4]["messages"][1:1] = [user("word " * 60), {"role": "assistant", "content": "Yes."}]
    samples[5] = {**samples[5], "messages": [], "text": "word " * 100}
    samples[0]["messages"][1]["content"] += " <|im_end|></s><|im_end|>"
    samples[1]["messages"][2]["content"] = "<repo_name><|im_end|>"
    write_jsonl(run.path("preprocess", name), samples)
    manifest = read_json(run.path("preprocess", "manifest.json"))
    manifest["outputs"][name] = describe_output(
        run.stage_folder("preprocess"), name, None, FileHashes(run.folder / "none")
    )
    write_json(run.path("preprocess", "manifest.json"), manifest)
    code, output = training()
    assert code == 0, output
    found = read_json(run.path("train", "adapters", "tuned", "training.json"))
    assert found["cut"] == {"train": 1, "validation": 0}
    assert found["in_pieces"] == {"train": 1, "validation": 0, "pieces": 2}
    counts = training.manifest()["counts"]
    assert (counts["tuned conversations cut"], counts["tuned texts in pieces"], counts["tuned samples"]) == (1, 1, 6)
    for line in (
        "train: adapter tuned: 1 conversations are longer than train.max_length and begin at a later turn",
        "train: adapter tuned: 1 texts are longer than train.max_length and are cut into 2 pieces",
    ):
        assert line in output.splitlines()
    said = {"samples": 2, "<|im_end|>": 3, "<repo_name>": 1}
    assert training.manifest().get("control_words") == {"tuned": said}
    assert training.manifest()["attention"] == {"tuned": {"kernel": "plain"}}
    assert read_json(run.path("train", "adapters", "tuned", "training.json"))["control_words"] == said
    line = (
        "train: adapter tuned: 2 samples say control words of the model, such as '<|im_end|>'; they are encoded as text"
    )
    assert line in output.splitlines()
