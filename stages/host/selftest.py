"""`lorry-<stage> selftest`: does this image hold what its stage and its target need?

It imports the stage's libraries for real, looks for device code for the target's cards in them, and asks a GPU if one
is visible. The build of every image runs it, so an image without code for its card is never made.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from stages.contract.errors import DoesNotFitError, UsageError
from stages.contract.roots import Roots
from stages.engines import engine_libraries
from stages.hardware.fatbin import architectures, serves
from stages.hardware.targets import Target, load_targets, named_target
from stages.host.needs import LIBRARIES, ON_CARDS, WHERE_INSTALLED


def selftest(stage: str) -> None:
    """Print what is here. Raises UsageError for what is broken, DoesNotFitError for what lacks the target's code."""
    name = os.environ.get("LORRY_TARGET")
    target = named_target(name, load_targets()) if name else None
    image, revision = os.environ.get("LORRY_IMAGE"), os.environ.get("LORRY_REVISION")
    click.echo(f"lorry {importlib.metadata.version('lorry')}, revision {revision or 'unknown'}")
    click.echo(f"image {image or 'none (a local process)'}, target {name or 'by the cards'}")
    click.echo(f"python {platform.python_version()}")
    optional = [library for library in WHERE_INSTALLED.get(stage, ()) if importlib.util.find_spec(library)]
    modules = {library: _imported(library) for library in (*LIBRARIES[stage], *optional)}
    for library, module in modules.items():
        click.echo(f"{library} {_version(library, module)}")
    _check_code(stage, modules, target)
    unwritable = [folder for folder in (Roots.from_environment().runs, Path("/caches")) if not _show_folder(folder)]
    _show_gpus(modules.get("torch"))
    if unwritable:
        raise UsageError(f"{unwritable[0]} is mounted, but not writable for uid {os.getuid()}: chown it on the host")


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except Exception as error:  # a missing module, a missing .so, or whatever a library does when it is loaded
        why = " ".join(str(error).split())[:300]
        raise UsageError(f"{library} cannot be imported: {type(error).__name__}: {why}") from error


def _version(library: str, module: Any) -> str:
    distributions = importlib.metadata.packages_distributions().get(library, [])
    if distributions:
        return importlib.metadata.version(distributions[0])
    return str(getattr(module, "__version__", "of unknown version"))


def _check_code(stage: str, modules: dict[str, Any], target: Target | None) -> None:
    """Show the architectures of every library with device code. Raises DoesNotFitError if one lacks the target's."""
    for name, compiled in _compiled(stage, modules):
        click.echo(f"code in {name}: {' '.join(sorted(compiled, key=_by_number)) or 'none for any card'}")
        if target is not None and target.capability is not None and not serves(compiled, target.capability):
            number = "".join(str(part) for part in target.capability)
            raise DoesNotFitError(f"{name} has no code for target {target.name}, sm_{number}: take another build of it")


def _compiled(stage: str, modules: dict[str, Any]) -> Iterator[tuple[str, set[str]]]:
    """The libraries that a card needs code in, and the architectures that each was compiled for.

    Left out are those that serve some cards by design, such as vLLM's flash attention.
    """
    torch = modules.get("torch")
    if torch is None:
        return
    cuda = torch.version.cuda
    if cuda or stage in ON_CARDS:
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


def _by_number(name: str) -> tuple[str, int]:
    kind, _, number = name.partition("_")
    return kind, int("".join(character for character in number if character.isdigit()))


def _show_folder(folder: Path) -> bool:
    """Say whether a mount can be written. False only for one that is mounted and cannot."""
    writable = os.access(folder, os.W_OK | os.X_OK)
    state = "writable" if writable else "not writable" if folder.exists() else "not there"
    click.echo(f"{folder} {state} for uid {os.getuid()}")
    return writable or not folder.is_mount()


def _show_gpus(torch: Any) -> None:
    """Compute a little on every visible GPU."""
    if torch is None:
        click.echo("GPU not used by this stage")
        return
    if not torch.cuda.is_available():
        click.echo("no GPU visible")
        return
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}", dtype=torch.float16)
            total = float((ones @ ones).float().sum())
        except RuntimeError as error:
            raise DoesNotFitError(f"GPU {index} ({name}) does not compute: {str(error).splitlines()[0]}") from error
        if total != 64.0**3:
            raise DoesNotFitError(f"GPU {index} ({name}) computes wrongly: {total} instead of {64.0**3}")
        click.echo(f"GPU {index} {name} computes")
