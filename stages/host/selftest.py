"""Does the work of `lorry-<stage> selftest`: checks that an image has all that its stage and target need.

It imports the stage's libraries, looks in them for device code for the target's card, and computes on each visible GPU.
The build of every image runs it and fails if the image has no code for its card.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from stages.contract.errors import DoesNotFitError, UsageError
from stages.contract.roots import Roots
from stages.engines import engine_libraries
from stages.hardware.fatbin import architectures, has_code_for
from stages.hardware.pick import hide_unusable_gpus
from stages.hardware.targets import Target, load_targets, named_target
from stages.host.needs import GPU_STAGES, LIBRARIES, OPTIONAL_LIBRARIES


def selftest(stage: str) -> Generator[str, None, None]:
    """Check that this image, or this host, has what a stage needs. Yields a line for each check.

    Raises UsageError for an unknown LORRY_TARGET, a library that cannot be imported or read, or a mount that is not
    writable, DoesNotFitError for a library without code for the target's card, or a GPU that does not compute, and the
    errors of `hide_unusable_gpus`.
    """
    name = os.environ.get("LORRY_TARGET")
    target = named_target(name, load_targets()) if name else None
    image, revision = os.environ.get("LORRY_IMAGE"), os.environ.get("LORRY_REVISION")
    yield f"lorry {importlib.metadata.version('lorry')}, revision {revision or 'unknown'}"
    yield f"image {image or 'none (a local process)'}, target {name or 'by the GPUs'}"
    yield f"python {platform.python_version()}"
    yield from hide_unusable_gpus(needs_one=False)
    optional = [library for library in OPTIONAL_LIBRARIES.get(stage, ()) if importlib.util.find_spec(library)]
    modules = {library: _import_library(library) for library in (*LIBRARIES[stage], *optional)}
    yield from (f"{library} {_version(library, module)}" for library, module in modules.items())
    yield from _check_code(stage, modules, target)
    unwritable = []
    for folder in (Roots.from_environment().runs, Path("/caches")):
        writable = os.access(folder, os.W_OK | os.X_OK)
        state = "writable" if writable else "not writable"
        yield f"{folder} {state} for uid {os.getuid()}" if folder.exists() else f"{folder} does not exist"
        if not writable and folder.is_mount():
            unwritable.append(folder)
    yield from _check_gpus(modules.get("torch"))
    if unwritable:
        raise UsageError(f"{unwritable[0]}: mounted, but not writable for uid {os.getuid()}; chown it on the host")


def _import_library(library: str) -> Any:
    """Import a library and return it. Raises UsageError if the import fails, whatever the exception."""
    try:
        return importlib.import_module(library)
    except Exception as error:  # a missing module, a missing .so, or a bug in the library
        why = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{library}: cannot be imported ({type(error).__name__}: {why}); install it again, or build the image again"
        ) from error


def _version(library: str, module: Any) -> str:
    """The version of an imported library; `of unknown version` if it states none."""
    distributions = importlib.metadata.packages_distributions().get(library, [])
    if distributions:
        return importlib.metadata.version(distributions[0])
    return str(getattr(module, "__version__", "of unknown version"))


def _check_code(stage: str, modules: dict[str, Any], target: Target | None) -> Iterator[str]:
    """Yield a line on each library file: the architectures that it has device code for.

    Raises DoesNotFitError if a library has no code for the target's card.
    """
    for name, found in _device_code(stage, modules):
        yield f"code in {name}: {' '.join(sorted(found, key=_sort_key)) or 'none for any card'}"
        if target is not None and target.capability is not None and not has_code_for(found, target.capability):
            number = "".join(str(part) for part in target.capability)
            raise DoesNotFitError(f"{name}: no code for target {target.name}, sm_{number}; install another build")


def _device_code(stage: str, modules: dict[str, Any]) -> Iterator[tuple[str, set[str]]]:
    """Yield the name of each library file that needs code for the target's card, and the architectures of its code.

    Files that are meant for some cards only, such as vLLM's flash attention, are left out. Yields nothing for a stage
    without torch.
    """
    torch = modules.get("torch")
    if torch is None:
        return
    cuda = torch.version.cuda
    if cuda or stage in GPU_STAGES:
        flags = torch._C._cuda_getArchFlags() if cuda else ""  # torch.cuda.get_arch_list() is empty without a GPU
        yield "torch", set((flags or "").split())
    patterns = {
        **{library: files for library, files in engine_libraries().items() if files},
        "bitsandbytes": (f"libbitsandbytes_cuda{(cuda or '').replace('.', '')}.so",),
        "auto_gptq": ("../autogptq_cuda_*.so",),
        "flash_attn": ("../flash_attn_2_cuda*.so",),
    }
    for library, names in patterns.items():
        if library in modules and cuda:
            folder = Path(modules[library].__file__).parent
            for pattern in names:
                found = sorted((folder / pattern).parent.glob(Path(pattern).name))
                for path in found:
                    yield f"{library}/{path.name}", architectures(path)
                if not found:
                    yield f"{library}/{pattern}", set()


def _sort_key(name: str) -> tuple[str, int]:
    """The key to sort architectures by kind, then by number: sm_90 before sm_100."""
    kind, _, number = name.partition("_")
    return kind, int("".join(character for character in number if character.isdigit()))


def _check_gpus(torch: Any) -> Iterator[str]:
    """Compute on each visible GPU, and yield a line on each, or one line without torch or GPUs.

    Raises DoesNotFitError for a GPU that fails or computes a wrong result.
    """
    if torch is None:
        yield "GPU not used by this stage"
        return
    if not torch.cuda.is_available():
        yield "no GPU visible"
        return
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.float16)
            total = float((ones @ ones).float().sum())
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise DoesNotFitError(f"GPU {index} ({name}): does not compute ({why}); use another GPU") from error
        if total != 64.0**3:
            raise DoesNotFitError(f"GPU {index} ({name}): computes {total} instead of {64.0**3}; use another GPU")
        yield f"GPU {index} {name} computes"
