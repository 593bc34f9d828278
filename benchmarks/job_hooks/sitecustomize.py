"""What `benchmarks.jobs` changes in Lorry's processes. Python imports this module at start, from PYTHONPATH.

* A model folder with a file named NO_WEIGHTS has safetensors files of the right sizes without contents: transformers
  makes random weights on the device instead of reading them, and vLLM makes its own (`load_format="dummy"`).
* Random weights never end an answer as trained ones do, so no completion ends before its limit of tokens.
* With LORRY_JOBS_LETTERS, a number, the text of a completion is one of so many letters, on which its tokens and the
  adapter's name decide: an answer for the vote.
* With LORRY_JOBS_VLLM, a JSON object, vLLM gets these arguments too; with LORRY_JOBS_KERNEL, training has only this
  attention kernel.
* The file that LORRY_JOBS_NOTES names gets a line of JSON when an engine is ready, at its first token, and after each
  call of `generate`; with LORRY_JOBS_PROMPTS, also the tokens of all prompts.

Each change is made just after the module that it concerns was imported, so that other processes start as fast as ever.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

NO_WEIGHTS = "no_weights"
LETTERS = "ABCDEFG"


def note(**fields: Any) -> None:
    """Append a line to the file of notes, if there is one."""
    path = os.environ.get("LORRY_JOBS_NOTES")
    if path:
        with open(path, "a", encoding="utf-8") as file:  # noqa: PTH123 - one write, so that lines stay whole
            file.write(json.dumps({"time": time.time(), **fields}) + "\n")


def make_weights_on_device(module: Any) -> None:
    """Have transformers make the weights of a folder without any: as it initialises them, the same every time."""
    model_class = module.PreTrainedModel
    read = model_class.from_pretrained.__func__

    def from_pretrained(cls: Any, folder: Any, *arguments: Any, **options: Any) -> Any:
        """As transformers' own, except for a folder without weights."""
        if not (Path(folder) / NO_WEIGHTS).is_file():
            return read(cls, folder, *arguments, **options)
        import torch

        torch.manual_seed(0)
        kept = {name: options[name] for name in ("dtype", "attn_implementation") if options.get(name)}
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return cls._from_config(options["config"], **kept).eval()

    model_class.from_pretrained = classmethod(from_pretrained)


def change_vllm_arguments(module: Any) -> None:
    """Have vLLM make its weights where a folder has none, and give it the arguments of LORRY_JOBS_VLLM."""
    own = module.vllm_arguments

    @wraps(own)
    def vllm_arguments(settings: Any, *others: Any) -> dict[str, Any]:
        found: dict[str, Any] = {**own(settings, *others), **json.loads(os.environ.get("LORRY_JOBS_VLLM", "{}"))}
        if (Path(settings.model) / NO_WEIGHTS).is_file():
            found["load_format"] = "dummy"
        note(what="arguments", arguments=found)
        return found

    module.vllm_arguments = vllm_arguments


def change_vllm_engine(module: Any) -> None:
    """Fix the lengths of vLLM's completions, and note what it does."""
    engine = module.VllmEngine
    sampling, start = engine._sampling, engine.__init__

    def fixed_sampling(self: Any, prompt: Any) -> Any:
        found = sampling(self, prompt)
        found.ignore_eos, found.min_tokens = True, found.max_tokens
        return found

    def noted_start(self: Any, *arguments: Any) -> None:
        note(what="engine starts")
        start(self, *arguments)
        note(what="engine ready")
        vllm = self._llm.llm_engine
        step = vllm.step

        def first_steps() -> Any:
            found = step()
            if found:
                note(what="first token")
                vllm.step = step
            return found

        vllm.step = first_steps

    engine._sampling, engine.__init__ = fixed_sampling, noted_start
    _note_generate(engine)
    _answer_with_letters(engine)


def change_transformers_engine(module: Any) -> None:
    """Fix the lengths of the transformers engine's completions, and note what it does."""
    config = module.GenerationConfig

    def fixed_config(**options: Any) -> Any:
        if "max_new_tokens" in options:
            options["min_new_tokens"] = options["max_new_tokens"]
        return config(**options)

    engine, sampling = module.TransformersEngine, module._Sampling
    start, sample = engine.__init__, sampling.__call__

    def noted_start(self: Any, *arguments: Any) -> None:
        note(what="engine starts")
        start(self, *arguments)
        note(what="engine ready")

    def first_sample(self: Any, *arguments: Any) -> Any:
        note(what="first token")
        sampling.__call__ = sample
        return sample(self, *arguments)

    module.GenerationConfig, engine.__init__, sampling.__call__ = fixed_config, noted_start, first_sample
    _note_generate(engine)
    _answer_with_letters(engine)


def _note_generate(engine: Any) -> None:
    """Note each call of an engine's `generate`: its seconds, prompts and tokens."""
    own = engine.generate

    def generate(self: Any, prompts: list[Any], adapter: str | None, *done: Any) -> Any:
        began = time.time()
        self._answering = adapter
        found = own(self, prompts, adapter, *done)
        lengths = [completion.tokens for completion in found]
        note(
            what="generate",
            began=began,
            adapter=adapter,
            prompts=len(prompts),
            prompt_tokens=sum(prompt.length for prompt in prompts),
            tokens=sum(lengths),
            shortest=min(lengths, default=0),
            longest=max(lengths, default=0),
        )
        _write_prompts(self, prompts, adapter)
        return found

    engine.generate = generate


def _write_prompts(engine: Any, prompts: list[Any], adapter: str | None) -> None:
    """Append the prompts of a call to the file that LORRY_JOBS_PROMPTS names, if it does."""
    path = os.environ.get("LORRY_JOBS_PROMPTS")
    if not path:
        return
    asked = [
        {
            "tokens": prompt.tokens,
            "limit": prompt.max_new_tokens or engine._settings.max_new_tokens,
            "pictures": [[str(one.path.absolute()), one.width, one.height, one.tokens] for one in prompt.pictures],
        }
        for prompt in prompts
    ]
    folder = engine._settings.adapters.get(adapter)
    call = {"adapter": adapter, "folder": folder and str(Path(folder).absolute()), "prompts": asked}
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(json.dumps(call) + "\n")


def _answer_with_letters(engine: Any) -> None:
    """With LORRY_JOBS_LETTERS, replace the texts of an engine's completions."""
    if not os.environ.get("LORRY_JOBS_LETTERS"):
        return
    from dataclasses import replace

    own = engine._completion

    def completion(self: Any, output: Any) -> Any:
        found = own(self, output)
        drawn = sum(map(int, getattr(output, "token_ids", output))) + sum((self._answering or "").encode())
        letter = LETTERS[drawn % int(os.environ["LORRY_JOBS_LETTERS"])]
        return replace(found, text=f"答案是：{letter}")

    engine._completion = completion


def keep_one_kernel(module: Any) -> None:
    """With LORRY_JOBS_KERNEL, remove all attention kernels but that one."""
    wanted = os.environ.get("LORRY_JOBS_KERNEL")
    for name in [name for name in module.KERNELS if wanted and name != wanted]:
        del module.KERNELS[name]


CHANGES: dict[str, Callable[[Any], None]] = {
    "transformers.modeling_utils": make_weights_on_device,
    "stages.engines.vllm_options": change_vllm_arguments,
    "stages.engines.vllm_engine": change_vllm_engine,
    "stages.engines.transformers_engine": change_transformers_engine,
    "stages.train.attention": keep_one_kernel,
}


class Changes(importlib.abc.MetaPathFinder):
    """Finds the modules in CHANGES as usual, and changes each when it has been imported."""

    def find_spec(self, name: str, _path: Any, _target: Any = None) -> Any:
        """The spec of a module that is to be changed; None for any other."""
        change = CHANGES.pop(name, None)
        spec = importlib.util.find_spec(name) if change else None
        if spec is None or spec.loader is None:
            return None
        run: Callable[[Any], None] = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            assert change is not None
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("LORRY_JOBS"):
    sys.meta_path.insert(0, Changes())
