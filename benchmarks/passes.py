"""Patent questions answered in batched passes by one engine, against one request at a time and three calls a question.

    LORRY_MODELS=models LORRY_RUNS=runs python -m benchmarks.passes [prepare | original | lorry | rows] [long | short]

Without a word all four, in processes of their own. Needs a GPU of 80 GB, vLLM, and SmolLM2's tokenizer. The model has
Qwen2.5-VL-7B's shape and random weights, so that every answer is as long as it may be: `long` are the original's
limits (768 and 2,000 tokens, 768 for the short form), `short` is what a tuned model writes (96 and 24). Both ways get
the same questions and pages; the original's are its own, drawn at 600 DPI and shrunk by the reader.
"""

import importlib.metadata
import json
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.random_models import CONFIGS, make_model
from benchmarks.rows import write_rows
from recipes.demo_models import TEMPLATE
from stages.contract.files import FileHashes, read_json, read_jsonl, write_json, write_jsonl
from stages.contract.recipe import load_recipe
from stages.contract.roots import Roots
from stages.contract.run import CONTRACT_VERSION, Run, describe_output
from stages.engines.engine import Renderer
from stages.tasks import Found, settled
from stages.tasks.patent_qa import ask, build_samples
from stages.tasks.patent_qa.questions import PatentQuestion

MODEL = "Qwen2.5-VL-7B"
DOCUMENTS, PAGES, QUESTIONS = 32, 6, 96
ONE_BY_ONE = 8
"""Questions that are asked the original's way: it takes minutes for what the batch does in seconds."""
LIMITS = {
    "long": ("infer.max_new_tokens=2000", "infer.passes.page_tokens=768", "infer.passes.refine_tokens=768"),
    "short": ("infer.max_new_tokens=96", "infer.passes.page_tokens=96", "infer.passes.refine_tokens=24"),
}
REAL_TOKENS = 49152
"""Of SmolLM2's tokenizer; the rest of the vocabulary stands for nothing and must not be answered."""
ROOTS = Roots.from_environment()


def run_of(length: str) -> Run:
    sets = (f"model.path={MODEL}", *LIMITS[length])
    recipe = settled(load_recipe(Path("recipes/patent-qa.yaml"), None, sets), "recipes/patent-qa.yaml")
    return Run(f"passes-{length}", recipe, ROOTS)


# -- what both ways are given ------------------------------------------------------------------------------------


def prepare() -> None:
    """A model, pages and questions, as preprocess and train would have left them."""
    model = ROOTS.models / MODEL
    make_model(model, CONFIGS[MODEL])
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _silence_unused_tokens(model)
    for length in LIMITS:
        random.seed(0)
        run = run_of(length)
        questions = [_question(number) for number in range(QUESTIONS)]
        samples = [_sample(run, question) for question in questions]
        rows = [{"idx": str(q.row), "id": q.id, "document": q.document, "question": q.text} for q in questions]
        write_jsonl(run.path("preprocess", "samples", "test.jsonl"), samples)  # type: ignore[arg-type]
        write_jsonl(run.path("preprocess", "asked.jsonl"), rows)
        drawn = [
            (run.path("preprocess", "pages"), d, p, 2_352_000) for d in range(DOCUMENTS) for p in range(1, PAGES + 1)
        ]
        with ProcessPoolExecutor() as pool:
            list(pool.map(_draw, drawn))
        _adapter(run, run.path("train", "adapters", "tuned"))
        _describe(run, "preprocess", "samples/test.jsonl", "asked.jsonl", "pages/")
        _describe(run, "train", "adapters/tuned/adapter_config.json", "adapters/tuned/adapter_model.safetensors")
    shown = {(int(Path(i).parent.name[1:]), int(Path(i).stem)) for s in samples[:ONE_BY_ONE] for i in s["images"]}
    with ProcessPoolExecutor() as pool:  # 4960 x 7016 pixels: A4 at 600 DPI
        list(pool.map(_draw, [(ROOTS.runs / "passes-600dpi", d, p, 4960 * 7016) for d, p in sorted(shown)]))


def _question(number: int) -> PatentQuestion:
    """Two of three name a page."""
    page = number % PAGES + 1 if number % 3 else None
    text = f"该装置的部件{number}起什么作用？"
    if page:
        text = f"在文件中第{page}页的图中，部件{number}相对于部件{number + 1}的位置关系是？"
    document = f"D{number % DOCUMENTS}.pdf"
    return PatentQuestion(f"q{number}", text, document, page, None, ("x",), (), "", "test", number)


def _sample(run: Run, question: PatentQuestion) -> Any:
    name = question.document.removesuffix(".pdf")
    pages = {p: {"page": p, "text": "", "image": f"preprocess/pages/{name}/{p}.jpg"} for p in range(1, PAGES + 1)}
    ranked = random.sample(range(1, PAGES + 1), PAGES)
    found = Found(pages=pages, ranked=ranked, examples=["在部件5的上方", "弹簧座"])
    return build_samples(run.recipe, question, found, "test")[0]


def _draw(what: tuple[Path, int, int, int]) -> None:
    """A page of A4 with a drawing's lines and numbers, at so many pixels."""
    from PIL import Image, ImageDraw

    folder, document, page, pixels = what
    height = round((pixels * 2**0.5) ** 0.5 / 28) * 28
    width = pixels // height // 28 * 28
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    generator = random.Random(f"{document} {page}")
    scale = width / 1000
    for number in range(60):
        x, y = generator.uniform(50, 900) * scale, generator.uniform(50, 1300) * scale
        far = (x + generator.uniform(-300, 300) * scale, y + generator.uniform(-300, 300) * scale)
        pen.line([(x, y), far], fill="black", width=max(round(2 * scale), 1))
        pen.text((x, y), str(number), fill="black", font_size=14 * scale)
    (folder / f"D{document}").mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"D{document}" / f"{page}.jpg", quality=90)


def _silence_unused_tokens(folder: Path) -> None:
    """Zero the head's rows of tokens that stand for nothing: their logit is 0, and some other's is always above."""
    import struct

    index = read_json(folder / "model.safetensors.index.json")["weight_map"]
    path = folder / index["lm_head.weight"]
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entry = json.loads(file.read(length))["lm_head.weight"]
        start, end = entry["data_offsets"]
        row = 2 * entry["shape"][1]
        file.seek(8 + length + start + REAL_TOKENS * row)
        file.write(bytes(end - start - REAL_TOKENS * row))


def _adapter(run: Run, folder: Path) -> None:
    """A LoRA adapter with random weights, named as training names them."""
    import torch
    from safetensors.torch import save_file

    config, rank = CONFIGS[MODEL], run.recipe.train.rank
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    sizes = {
        **{
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, keys),
            "self_attn.v_proj": (hidden, keys),
        },
        **{"self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner)},
        "mlp.down_proj": (inner, hidden),
    }
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in sizes.items():
            stem = f"base_model.model.model.language_model.layers.{layer}.{name}"
            weights[f"{stem}.lora_A.weight"] = torch.randn(rank, inputs) * 0.01
            weights[f"{stem}.lora_B.weight"] = torch.randn(outputs, rank) * 0.01
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    modules = r"^(model\.language_model(?=\.).*\.(v_proj|q_proj|o_proj|up_proj|k_proj|gate_proj|down_proj))$"
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 32, "target_modules": modules, "task_type": "CAUSAL_LM"}
    write_json(folder / "adapter_config.json", {**settings, "bias": "none", "base_model_name_or_path": MODEL})


def _describe(run: Run, stage: str, *names: str) -> None:
    hashes = FileHashes(run.folder / "none")
    manifest = {
        "contract": CONTRACT_VERSION,
        "version": importlib.metadata.version("lorry"),
        "key": run.key(stage, {}),
        "inputs": {},
        "outputs": {name: describe_output(run.stage_folder(stage), name, None, hashes) for name in names},
    }
    write_json(run.path(stage, "manifest.json"), manifest)


# -- the two ways ------------------------------------------------------------------------------------------------


def original(length: str) -> None:
    """One prompt at a time, three calls a question: classify, answer, refine. Each call reads its own pictures."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    run = run_of(length)
    samples: list[Any] = read_jsonl(run.path("preprocess", "samples", "test.jsonl"))[:ONE_BY_ONE]
    renderer = Renderer(ROOTS.models / MODEL)
    started = time.monotonic()
    llm = LLM(
        model=str(ROOTS.models / MODEL),
        dtype="bfloat16",
        max_model_len=16384,  # the original's 8,192 do not hold three pages with 2,000 tokens of answer
        max_num_seqs=1,
        gpu_memory_utilization=0.9,
        limit_mm_per_prompt={"image": 3},
        mm_processor_cache_gb=0,  # as in its day: every call prepares its pictures
        mm_processor_kwargs={"max_pixels": 2_352_000},
    )
    started = time.monotonic() - started

    def call(wanted: Any) -> str:
        prompt = renderer.render("x", wanted.messages, [run.folder / i for i in wanted.images], wanted.max_pixels)
        tokens = TokensPrompt(prompt_token_ids=prompt.tokens)
        if wanted.images:
            pages = [ROOTS.runs / "passes-600dpi" / Path(i).parent.name / Path(i).name for i in wanted.images]
            sizes = [(one.width, one.height) for one in prompt.pictures]
            tokens["multi_modal_data"] = {
                "image": [Image.open(p).convert("RGB").resize(s) for p, s in zip(pages, sizes, strict=True)]
            }
        limit = SamplingParams(temperature=0, max_tokens=wanted.max_new_tokens or run.recipe.infer.max_new_tokens)
        return str(llm.generate([tokens], limit, use_tqdm=False)[0].outputs[0].text)

    call(ask(run.recipe, samples[0], "refine", {"answer": "x"}, ()))  # what a first call compiles
    seconds, tokens = [], 0
    for sample in samples:
        began = time.monotonic()
        texts: dict[str, str] = {}
        for name in ("classify", "answer", "refine"):
            wanted = ask(run.recipe, sample, name, texts, ())
            if wanted is not None:
                texts[name] = call(wanted)
        seconds.append(time.monotonic() - began)
        tokens += sum(len(renderer.tokenizer.encode(text)) for text in texts.values())
    row = {
        "way": "one request at a time",
        "answers": length,
        "questions": len(samples),
        "engine start s": round(started, 1),
    }
    row |= {"seconds a question": round(statistics.mean(seconds), 3), "tokens written": tokens}
    print("ROW", json.dumps(row), flush=True)


def lorry(length: str) -> None:
    """The infer stage: base, and the adapter, each in three passes over all questions."""
    run = run_of(length)
    began = time.monotonic()
    sets = [word for value in (f"model.path={MODEL}", *LIMITS[length]) for word in ("--set", value)]
    command = [sys.executable, "-m", "entrypoints.infer", "patent-qa", "--run", run.name, *sets]
    code = subprocess.run(command, check=False).returncode
    wall = time.monotonic() - began
    manifest = read_json(run.path("infer", "manifest.json"))
    if manifest is None:
        print("ROW", json.dumps({"way": "batched passes", "answers": length, "exit code": code}), flush=True)
        return
    for name, took in manifest["answering"].items():
        found = read_jsonl(run.path("infer", "predictions", f"{name}.jsonl"))
        row = {"way": "batched passes", "answers": length, "model": name, "questions": took["samples"]}
        row |= {"seconds a question": round(took["seconds"] / took["samples"], 3)}
        row |= {"tokens written": sum(one["completion_tokens"] for one in found)}
        row |= {"failed": sum(one["error"] is not None for one in found)}
        row |= {"engine start s": manifest["engine_start_seconds"], "stage wall s": round(wall, 1)}
        row |= {"decisions": {made["what"]: made["value"] for made in manifest["decisions"]}}
        print("ROW", json.dumps(row, ensure_ascii=False), flush=True)


def main() -> None:
    words = sys.argv[1:]
    lengths = [word for word in words if word in LIMITS] or list(LIMITS)
    if "prepare" in words:
        prepare()
        return
    if "original" in words or "lorry" in words:
        for length in lengths:
            (original if "original" in words else lorry)(length)
        return
    rows: list[dict[str, Any]] = []
    if not (ROOTS.models / MODEL / "config.json").is_file():
        subprocess.run([sys.executable, "-m", "benchmarks.passes", "prepare"], check=True)
    for length in lengths:
        for way in ("original", "lorry"):
            command = [sys.executable, "-m", "benchmarks.passes", way, length]
            output = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True).stdout
            rows += [json.loads(line.removeprefix("ROW ")) for line in output.splitlines() if line.startswith("ROW ")]
            write_rows("passes", rows, "python -m benchmarks.passes")
        one = next((r for r in rows if r["answers"] == length and r["way"].startswith("one")), None)
        for row in [r for r in rows if r["answers"] == length and "seconds a question" in r and r is not one]:
            if one is not None:
                row["times the original's questions a second"] = round(
                    one["seconds a question"] / row["seconds a question"], 1
                )
    write_rows("passes", rows, "python -m benchmarks.passes")


if __name__ == "__main__":
    main()
