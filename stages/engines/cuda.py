"""Whether torch can use the GPUs that are here. Without this check it would compute on the CPU and not say so."""

from collections.abc import Sequence

from stages.contract.errors import DoesNotFitError
from stages.hardware.probe import probe, read_cards


def refuse_dead_gpus() -> None:
    """Raise DoesNotFitError if this process may use GPUs and torch cannot."""
    refuse_dead_cards([f"{gpu}, {gpu.uuid}" for gpu in probe().gpus])


def refuse_dead_cards(cards: Sequence[str]) -> None:
    """Raise DoesNotFitError if torch cannot use these GPUs, given as text. torch's own error comes late and hides the
    cause."""
    import torch

    if not cards or torch.cuda.is_available():
        return
    driver, version = read_cards().driver or "of an unknown version", torch.__version__
    if torch.version.cuda is None:
        raise DoesNotFitError(
            f"{'; '.join(cards)}: torch {version} is built without CUDA (NVIDIA driver {driver}); install a torch with"
            " CUDA, or set LORRY_TARGET=cpu to compute without GPUs"
        )
    raise DoesNotFitError(
        f"{'; '.join(cards)}: torch {version} is built for CUDA {torch.version.cuda} and cannot use them with NVIDIA"
        f" driver {driver}; update the driver, or install a torch for an older CUDA (`lorry doctor` shows both)"
    )
