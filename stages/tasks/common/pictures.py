"""The pictures of questions, stored in the run: checked, and padded to squares if the recipe asks for it."""

import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from stages.contract.errors import DataError
from stages.contract.files import open_atomically
from stages.contract.machine_errors import raise_machine_fault
from stages.models.pictures import picture_size, read_picture
from stages.tasks.common.json_lines import BadRecordError

MEAN_COLOUR = (122, 116, 104)
"""CLIP's mean colour, with which LLaVA-1.5 pads; about 0 in the vision tower's input."""


@dataclass(frozen=True)
class StoredPicture:
    """A picture in <run>/preprocess/pictures."""

    name: str
    """File name in that folder."""
    digest: str
    """sha256 (hex) of the picture file as the data have it."""


@dataclass(frozen=True)
class _PreparedPicture:
    """A picture that was checked, and padded if the recipe asks for it."""

    stored: StoredPicture
    content: bytes | None
    """Content of the file to write; None if the file exists already."""


class Pictures:
    """Stores pictures in a folder of the run, each once, named by its digest. Existing files are not written again."""

    def __init__(self, data: Path, folder: Path, pad: bool) -> None:
        self._data, self._folder, self._pad = data, folder, pad
        self._existing = {path.stem: path.name for path in folder.iterdir() if not path.name.startswith(".")}
        self._known: dict[str, StoredPicture | BadRecordError] = {}

    def fetch(self, names: Iterable[str]) -> None:
        """Read the named pictures with a thread per CPU, and store them. `of_file` then returns each, or raises its
        error."""
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for name, prepared in zip(new, pool.map(self._prepare_file, new), strict=True):
                self._known[name] = prepared if isinstance(prepared, BadRecordError) else self._store(prepared)

    def of_file(self, name: str) -> StoredPicture:
        """The stored picture of a file, named relative to the data folder. Raises BadRecordError if it is unusable."""
        self.fetch([name])
        found = self._known[name]
        if isinstance(found, BadRecordError):
            raise BadRecordError(found.reason, str(found))
        return found

    def of_bytes(self, data: bytes, name: str) -> StoredPicture:
        """The stored picture of a file's content. Raises BadRecordError if it is damaged or not a picture; `name` is
        for that message."""
        return self._store(self._prepare(data, name))

    def _prepare_file(self, name: str) -> _PreparedPicture | BadRecordError:
        """The picture of a file below the data folder, ready to store, or the error that makes it unusable."""
        path = PurePosixPath(name)
        if path.is_absolute() and path.is_relative_to(self._data):
            path = path.relative_to(self._data)
        if path.is_absolute() or ".." in path.parts:
            return BadRecordError("picture outside the data folder", name)
        try:
            return self._prepare((self._data / path).read_bytes(), name)
        except OSError as error:
            raise_machine_fault(error)
            return BadRecordError("picture cannot be read", f"{name} ({error.strerror})")
        except ValueError as error:  # an impossible file name, such as one with a null byte
            return BadRecordError("picture cannot be read", f"{name!a} ({error})")
        except BadRecordError as error:
            return error

    def _prepare(self, data: bytes, name: str) -> _PreparedPicture:
        """The picture of a file's content, ready to store. Raises BadRecordError if it is damaged or not a picture."""
        digest = hashlib.sha256(data).hexdigest()
        stem = digest[:32] + ("-square" if self._pad else "")
        if stem in self._existing:
            return _PreparedPicture(StoredPicture(self._existing[stem], digest), None)
        try:
            width, height = picture_size(io.BytesIO(data))
            pads = self._pad and width != height
            # a JPEG decoded at low resolution also shows whether it is truncated
            picture = read_picture(io.BytesIO(data), None if pads else (1, 1))
        except DataError as error:
            raise BadRecordError(
                "not a picture, or damaged", f"{name} ({' '.join(str(error.__cause__).split())})"
            ) from error
        kind = str(picture.format)
        if pads:
            kind, data = ("JPEG" if kind == "JPEG" else "PNG"), _padded_file(picture)
        return _PreparedPicture(StoredPicture(f"{stem}.{'jpg' if kind == 'JPEG' else kind.lower()}", digest), data)

    def _store(self, prepared: _PreparedPicture) -> StoredPicture:
        """Write a picture unless its file exists. Returns the stored picture."""
        path = self._folder / prepared.stored.name
        if prepared.content is not None and path.stem not in self._existing:
            with open_atomically(path, "wb") as file:
                file.write(prepared.content)
            self._existing[path.stem] = path.name
        return prepared.stored


def _padded_file(picture: Image.Image) -> bytes:
    """The content of a file with an RGB picture centred in a square of its longer side, on MEAN_COLOUR: JPEG if the
    picture was JPEG, else PNG."""
    side = max(picture.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    data = io.BytesIO()
    if picture.format == "JPEG":
        square.save(data, "JPEG", quality=95)
    else:
        square.save(data, "PNG")
    return data.getvalue()
