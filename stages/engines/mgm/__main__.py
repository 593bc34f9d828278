"""python -m stages.engines.mgm PUBLISHED OUTPUT [--clip FOLDER] [--convnext FOLDER]: a published MGM checkpoint as one
Hugging Face folder."""

import argparse
import sys
from pathlib import Path

from stages.contract.errors import LorryError
from stages.engines.mgm.loading import convert


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m stages.engines.mgm", description=__doc__)
    parser.add_argument("published", type=Path, help="the published folder, such as YanweiLi/MGM-2B's")
    parser.add_argument("output", type=Path, help="the folder to make")
    parser.add_argument("--clip", type=Path, help="openai/clip-vit-large-patch14-336's folder")
    parser.add_argument("--convnext", type=Path, help="OpenCLIP's CLIP-convnext_large_d_320 folder")
    asked = parser.parse_args()
    try:
        convert(asked.published, asked.output, asked.clip, asked.convnext)
    except LorryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
