"""The pictures that questions show, put into the run: checked, and padded to squares where that is wanted."""

import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from stages.contract.files import written_atomically
from stages.tasks.common.json_lines import BadRecordError

MEAN_COLOUR = (122, 116, 104)
"""CLIP's mean, with which LLaVA-1.5 pads: nothing, to the vision tower."""


@dataclass(frozen=True)
class Stored:
    """A picture in <run>/preprocess/pictures."""

    name: str
    digest: str
    """sha256 (hex) of its file as it was."""


@dataclass(frozen=True)
class _Made:
    stored: Stored
    content: bytes | None
    """Of its file; None where that is there already."""


class Pictures:
    """Puts pictures into a folder of the run, each once, under its digest; one that is there is not made again."""

    def __init__(self, data: Path, folder: Path, pad: bool) -> None:
        self._data, self._folder, self._pad = data, folder, pad
        self._there = {path.stem: path.name for path in folder.iterdir() if not path.name.startswith(".")}
        self._known: dict[str, Stored | BadRecordError] = {}

    def fetch(self, names: Iterable[str]) -> None:
        """Do several pictures at once, as many as there are CPUs; `of_file` tells what has become of them."""
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for name, made in zip(new, pool.map(self._read, new), strict=True):
                self._known[name] = made if isinstance(made, BadRecordError) else self._kept(made)

    def of_file(self, name: str) -> Stored:
        """A picture by its name below the data folder. Raises BadRecordError where there is none."""
        self.fetch([name])
        found = self._known[name]
        if isinstance(found, BadRecordError):
            raise BadRecordError(found.reason, str(found))
        return found

    def of_bytes(self, data: bytes, name: str) -> Stored:
        """A picture by its file's content. Raises BadRecordError where that is none, or broken."""
        return self._kept(self._made(data, name))

    def _read(self, name: str) -> _Made | BadRecordError:
        path = PurePosixPath(name)
        if path.is_absolute() and path.is_relative_to(self._data):
            path = path.relative_to(self._data)
        if path.is_absolute() or ".." in path.parts:
            return BadRecordError("picture outside the data folder", name)
        try:
            return self._made((self._data / path).read_bytes(), name)
        except OSError as error:
            return BadRecordError("picture cannot be read", f"{name} ({error.strerror})")
        except ValueError as error:  # a name that no file can have, such as one with a null byte
            return BadRecordError("picture cannot be read", f"{name!a} ({error})")
        except BadRecordError as error:
            return error

    def _made(self, data: bytes, name: str) -> _Made:
        digest = hashlib.sha256(data).hexdigest()
        stem = digest[:32] + ("-square" if self._pad else "")
        if stem in self._there:
            return _Made(Stored(self._there[stem], digest), None)
        try:
            with Image.open(io.BytesIO(data)) as picture:
                kind = str(picture.format)
                if self._pad and picture.width != picture.height:
                    kind, data = ("JPEG" if kind == "JPEG" else "PNG"), _squared(picture)
                else:
                    picture.draft("RGB", (1, 1))  # a JPEG that is cut off is found out without all the work
                    picture.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise BadRecordError("no picture, or a broken one", f"{name} ({' '.join(str(error).split())})") from error
        return _Made(Stored(f"{stem}.{'jpg' if kind == 'JPEG' else kind.lower()}", digest), data)

    def _kept(self, made: _Made) -> Stored:
        path = self._folder / made.stored.name
        if made.content is not None and path.stem not in self._there:
            with written_atomically(path, "wb") as file:
                file.write(made.content)
            self._there[path.stem] = path.name
        return made.stored


def _squared(picture: Image.Image) -> bytes:
    """The file of a picture in the middle of a square of its longer side."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(picture.convert("RGB"), ((side - picture.width) // 2, (side - picture.height) // 2))
    data = io.BytesIO()
    if picture.format == "JPEG":
        square.save(data, "JPEG", quality=95)
    else:
        square.save(data, "PNG")
    return data.getvalue()
