"""Convert a published MGM checkpoint, or Gemma with the towers and a connector, into one Hugging Face folder.

python -m stages.models.mgm PUBLISHED OUTPUT [--clip FOLDER] [--convnext FOLDER] [--connector FILE] [--seed N]
"""

import argparse
import sys
from pathlib import Path

from stages.contract.errors import LorryError
from stages.models.mgm.loading import convert


def main() -> None:
    """Convert the checkpoint that the command line names. Exits with the error's code if that fails."""
    parser = argparse.ArgumentParser(prog="python -m stages.models.mgm", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "published", type=Path, help="Folder of YanweiLi/MGM-2B, or of google/gemma-2b-it to train MGM."
    )
    parser.add_argument("output", type=Path, help="Folder to write.")
    parser.add_argument("--clip", type=Path, help="Folder of openai/clip-vit-large-patch14-336.")
    parser.add_argument("--convnext", type=Path, help="Folder of OpenCLIP's CLIP-convnext_large_d_320.")
    parser.add_argument(
        "--connector",
        type=Path,
        help="mm_projector.bin of the first phase. Default: the published one, or a new one.",
    )
    parser.add_argument("--seed", type=int, default=42, help="Seed of a new connector. Default: 42.")
    options = parser.parse_args()
    try:
        source = convert(
            options.published, options.output, options.clip, options.convnext, options.connector, options.seed
        )
    except LorryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{options.output}: written, with the connector from {source}")


if __name__ == "__main__":
    main()
