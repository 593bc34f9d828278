"""python -m stages.models.mgm PUBLISHED OUTPUT [--clip FOLDER] [--convnext FOLDER] [--connector FILE]: a published MGM
checkpoint, or Gemma with the towers and a connector, as one Hugging Face folder."""

import argparse
import sys
from pathlib import Path

from stages.contract.errors import LorryError
from stages.models.mgm.loading import convert


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.models.mgm", description=__doc__)
    parser.add_argument("published", type=Path, help="YanweiLi/MGM-2B's folder; or google/gemma-2b-it's, to train one")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--clip", type=Path, help="openai/clip-vit-large-patch14-336's folder")
    parser.add_argument("--convnext", type=Path, help="OpenCLIP's CLIP-convnext_large_d_320 folder")
    parser.add_argument("--connector", type=Path, help="mm_projector.bin of the first phase; without it, a new one")
    parser.add_argument("--seed", type=int, default=42, help="of a new connector")
    asked = parser.parse_args()
    try:
        source = convert(asked.published, asked.output, asked.clip, asked.convnext, asked.connector, asked.seed)
    except LorryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(f"{asked.output}: written; its connector: {source}")


if __name__ == "__main__":
    main()
