"""Rows of images with a class each: read one at a time, made into pixels by the model's image processor."""

import hashlib
from dataclasses import dataclass, replace
from io import BytesIO
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gradfn.data import Images
from gradfn.errors import InputError
from gradfn.hf.datasets import class_numbers, row_names
from gradfn.hf.hub import summary
from gradfn.hf.models import processor_fingerprint
from gradfn.model.losses import model_loss

if TYPE_CHECKING:
    import datasets

__all__ = ["load_images"]

PATCH = 16
"""The side of the patches that images are counted in, where the model has none of its own."""


_PLAIN = ("string", "large_string", "binary", "large_binary")
"""Kinds of columns that hold paths or bytes."""


def load_images(
    rows: "datasets.Dataset",
    processor: Any,
    model: nn.Module,
    *,
    image_column: str | None = None,
    label_column: str = "label",
    folder: str | Path = ".",
) -> Images:
    """Images from a column of them, or of paths; all are looked at now, and made into pixels when asked for.

    Args:
        rows: what `load_rows` returns; a column `id` names the rows.
        processor: the model's, see `load_processor`; all images must come out of it in one shape.
        model: what is to read them; it is tried on the first. Its patches (of 16 x 16 pixels, where it has
            none) are what an image counts as in a batch.
        image_column: the column of images, of their bytes, or of paths. None is the only column of images
            that there is, or else "image".
        label_column: class names that the model knows, or class numbers.
        folder: what paths are relative to.

    Raises:
        InputError: a column is missing or holds something else, a file is not there or no image, a label is
            none of the model's classes, or the model cannot read what the processor makes.
    """
    config: Any = model.config
    labels = class_numbers(rows, label_column, config.label2id)
    column = _image_column(rows, image_column)
    files = _Files(_encoded(rows, column), column, Path(folder).expanduser())
    titles, digests = _looked_at(files)
    made_by = processor_fingerprint(processor)
    pixels = _Pixels(files, processor, getattr(config, "num_channels", 3))
    first = pixels(0)
    _check_reads(model, first)
    classes = {number: name for name, number in config.label2id.items()}
    told = zip(titles, labels.tolist(), strict=True)
    shown = [f"{title} → {classes.get(label, label)}" for title, label in told]
    return Images(
        replace(pixels, shape=first.shape), [f"{digest} {made_by}" for digest in digests],
        np.arange(len(rows)), _patches(config, first), row_names(rows), shown, {"labels": labels},
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Files:
    """The encoded images of a column, read where they are: in the rows, or in files of a folder."""

    rows: "datasets.Dataset"
    column: str
    folder: Path

    def read(self, row: int) -> tuple[str, bytes]:
        """The name of the file, where there is one, and the bytes of an image."""
        place: Any = self.rows[row][self.column] or {"bytes": None, "path": None}
        name = Path(place["path"]).name if place["path"] else f"image {row}"
        if place["bytes"] is not None:
            return name, place["bytes"]
        if not place["path"]:
            raise InputError(f"row {row} has no image in column {self.column!r}: leave it out")
        file = self.folder / place["path"]
        if not file.is_file():
            raise InputError(
                f"row {row} has the image {place['path']!r}, and {file} is no file: mend the path, which is "
                "relative to the dataset's"
            )
        return name, file.read_bytes()


@dataclass(frozen=True, eq=False)
class _Pixels:
    """What the image processor makes of an image; refused where it is not of the shape of the others."""

    files: _Files
    processor: Any
    channels: int
    shape: torch.Size | None = None

    def __call__(self, row: int) -> Tensor:
        name, data = self.files.read(row)
        try:
            image = _decoded(data, "L" if self.channels == 1 else "RGB")
            pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        except MemoryError:
            raise
        except Exception as error:  # whatever is raised here is about this image and this processor
            raise _unreadable(row, name, error) from error
        if self.shape not in (None, pixels.shape):
            a, b = (" x ".join(map(str, shape)) for shape in (pixels.shape, self.shape))
            raise InputError(
                f"row {row} ({name}) comes out of the image processor as {a} numbers, and the "
                f"first row as {b}: give images of one size, or a processor that resizes to one"
            )
        return pixels


def _unreadable(row: int, name: str, error: Exception) -> InputError:
    return InputError(
        f"row {row} ({name}) cannot be made into pixels ({summary(error)}): mend the image or leave it out"
    )


def _decoded(data: bytes, mode: str) -> Any:
    """An upright image of 8 bits a channel."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    if image.mode[0] in "IF":
        raise ValueError(f"its mode is {image.mode}, not one of 8 bits")
    if image.mode == "P":  # its transparency, if it has one, has no place in a palette of RGB
        image = image.convert("RGBA")
    return image.convert(mode)


def _looked_at(files: _Files) -> tuple[list[str], list[str]]:
    """The name of every image and a digest of its bytes; what is seen undecoded to be none is refused."""
    from PIL import Image

    names, digests = [], []
    for row in range(len(files.rows)):
        name, data = files.read(row)
        try:
            with Image.open(BytesIO(data)) as image:
                image.verify()
        except MemoryError:
            raise
        except Exception as error:  # decoders raise what they like
            raise _unreadable(row, name, error) from error
        names.append(name)
        digests.append(hashlib.sha256(data).hexdigest())
    return names, digests


def _image_column(rows: "datasets.Dataset", asked: str | None) -> str:
    import datasets

    found = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    column = asked or (found[0] if len(found) == 1 else "image")
    if column not in rows.column_names:
        raise InputError(
            f"no column {column!r} in the dataset, which has {', '.join(rows.column_names)}: "
            "name the images' with --image-column"
        )
    return column


def _encoded(rows: "datasets.Dataset", column: str) -> "datasets.Dataset":
    """The column alone, as bytes and path."""
    import datasets

    feature: Any = rows.features[column]
    known = isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in _PLAIN
    if not known and not (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise InputError(f"column {column!r} holds {kind}, not images or paths: name another --image-column")
    return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _patches(config: Any, pixels: Tensor) -> int:
    """How many patches the model makes of an image."""
    side = getattr(config, "patch_size", None) or PATCH
    sides = (side, side) if isinstance(side, int) else tuple(side)
    return prod(ceil(size / patch) for size, patch in zip(pixels.shape[1:], sides, strict=True))


def _check_reads(model: nn.Module, pixels: Tensor) -> None:
    """Refuse a processor whose pixels the model cannot read."""
    shape, device = " x ".join(map(str, pixels.shape)), next(model.parameters()).device
    try:
        with torch.no_grad():
            model_loss(model, "image_classification").logits({"pixel_values": pixels[None].to(device)})
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models say in their own ways what they cannot read
        raise InputError(
            f"the model cannot read images of {shape} numbers, as its image processor makes them "
            f"({summary(error)}): mend size and channels in its preprocessor_config.json"
        ) from error
