"""A training whose samples say control words of the model."""

from stages.contract.files import FileHashes, read_json, read_jsonl, write_json, write_jsonl
from stages.contract.run import describe_output
from tests.train.conftest import Training


def test_what_samples_say_is_counted_and_reported(training: Training) -> None:
    run, name = training.with_samples(4).run, "samples/train.jsonl"
    samples = read_jsonl(run.path("preprocess", name))
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
    said = {"samples": 2, "<|im_end|>": 3, "<repo_name>": 1}
    assert training.manifest().get("control_words") == {"tuned": said}
    assert training.manifest()["attention"] == {"tuned": {"kernel": "plain"}}
    assert read_json(run.path("train", "adapters", "tuned", "training.json"))["control_words"] == said
    line = (
        "train: adapter tuned: 2 samples say control words of the model, such as '<|im_end|>'; they are encoded as text"
    )
    assert line in output.splitlines()
