"""Draw pages with lines and numbers, for benchmarks that need more pages than the demo has."""

import random
from pathlib import Path


def draw_page(page: tuple[Path, int, int, int]) -> None:
    """Write a page with 60 numbered lines in random places as `D<document>/<number>.jpg` below a folder.

    `page` is (folder, document, number, approximate number of pixels), one argument because a pool's `map` passes one.
    The page has about the proportions of A4, and both sides are multiples of 28 pixels. The same document and number
    give the same drawing at any size.
    """
    from PIL import Image, ImageDraw

    folder, document, number, pixels = page
    height = round((pixels * 2**0.5) ** 0.5 / 28) * 28
    width = pixels // height // 28 * 28
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    generator = random.Random(f"{document} {number}")
    scale = width / 1000
    for part in range(60):
        x, y = generator.uniform(50, 900) * scale, generator.uniform(50, 1300) * scale
        far = (x + generator.uniform(-300, 300) * scale, y + generator.uniform(-300, 300) * scale)
        pen.line([(x, y), far], fill="black", width=max(round(2 * scale), 1))
        pen.text((x, y), str(part), fill="black", font_size=14 * scale)
    (folder / f"D{document}").mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"D{document}" / f"{number}.jpg", quality=90)
