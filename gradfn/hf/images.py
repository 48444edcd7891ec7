"""Rows of images with one class each. An image is read when asked for; the processor makes pixels of it."""

import base64
import hashlib
import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import BytesIO
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gradfn.data import Images
from gradfn.errors import InputError
from gradfn.hf.columns import class_names, class_numbers
from gradfn.hf.datasets import check_column, row_names
from gradfn.hf.hub import local, summary
from gradfn.hf.locate import load_pretrained, locate_processor
from gradfn.model.losses import model_loss
from gradfn.shown import asked_and_said
from gradfn.watch import watched

if TYPE_CHECKING:
    import datasets

__all__ = ["load_images"]

PATCH = 16
"""The side of the patches by which images are counted, where the model has no patches."""


FORMATS = ("PNG", "JPEG", "MPO", "JPEG2000", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "TGA", "ICO")
"""The formats that images may have, as Pillow calls them."""
_PLAIN = ("string", "large_string", "binary", "large_binary")
"""Kinds of columns that hold paths or bytes."""


def load_processor(path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The image processor of a model. It uses Pillow, so that pixels are the same on every machine.

    Args:
        path, revision: as for `load_model`.
        trust_remote_code: run Python code that comes with the processor.

    Raises:
        InputError: Pillow is not installed, there is no image processor, or it cannot be loaded.
    """
    if find_spec("PIL") is None:
        raise InputError("images are read with Pillow, which is not installed: pip install 'gradfn[images]'")
    from transformers import AutoImageProcessor

    source, options = locate_processor(path, revision)
    loader = AutoImageProcessor.from_pretrained
    options |= {"backend": "pil", "trust_remote_code": trust_remote_code}
    return load_pretrained("image processor", path, loader, source, **options)


def processor_fingerprint(processor: Any) -> str:
    """16 hex digits of everything that decides which pixels an image becomes."""
    settings = [type(processor).__name__, processor.to_dict()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def load_images(
    rows: "datasets.Dataset",
    processor: Any,
    model: nn.Module,
    *,
    image_column: str | None = None,
    label_column: str = "label",
    folder: str | Path = ".",
) -> Images:
    """Images from a column of images or of paths. Each file is checked now, and decoded when asked for.

    Args:
        rows: what `load_rows` returns; a column `id` names the rows.
        processor: the model's, see `load_processor`; it must make one shape of all images.
        model: the model that reads them; it is tried on the first image. In a batch, an image counts as its
            patches (of 16 x 16 pixels, where the model has none).
        image_column: the column of images, of their bytes, or of paths. None is the only column of images,
            or else "image".
        label_column: class names that the model knows, or class numbers.
        folder: the folder that paths are relative to.

    Raises:
        InputError: a column is missing or holds something else, a file is missing or not an image, a label
            is not a class of the model, or the model cannot read what the processor makes.
    """
    config: Any = model.config
    labels = class_numbers(rows, label_column, config.label2id)
    column = _image_column(rows, image_column)
    files = _Files(_encoded(rows, column), column, local(folder))
    titles, digests = _inspect(files)
    made_by = processor_fingerprint(processor)
    pixels = _Pixels(files, digests, processor, getattr(config, "num_channels", 3))
    first = pixels(0)
    _check_reads(model, first)
    shown = list(map(asked_and_said, titles, class_names(rows, label_column, config.label2id, labels)))
    return Images(
        replace(pixels, shape=first.shape), [f"{digest} {made_by}" for digest in digests],
        np.arange(len(rows)), _patches(config, first), row_names(rows), shown, {"labels": labels},
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Files:
    """The encoded images of a column, in the rows themselves or in files of a folder."""

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
                f"row {row} has the image {place['path']!r}, but {file} is not a file: correct the path, it "
                "is relative to the dataset's folder"
            )
        return name, file.read_bytes()


@dataclass(frozen=True, eq=False)
class _Pixels:
    """What the image processor makes of an image; another shape than the first's, or other bytes than those
    that were digested, are refused."""

    files: _Files
    digests: list[str]
    processor: Any
    channels: int
    shape: torch.Size | None = None

    def __call__(self, row: int) -> Tensor:
        name, data = self.files.read(row)
        if hashlib.sha256(data).hexdigest() != self.digests[row]:
            raise InputError(
                f"the image of row {row} ({name}) was replaced while it was in use: run again, and leave the "
                "images as they are until the run is done"
            )
        try:
            image = _decoded(data, "L" if self.channels == 1 else "RGB")
            with np.errstate(all="ignore"):  # what is not finite is refused below
                pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        except MemoryError:
            raise
        except Exception as error:  # whatever is raised here is about this image and this processor
            raise _unreadable(row, name, error) from error
        if not bool(pixels.isfinite().all()):
            raise InputError(
                f"the image processor makes NaN or infinite numbers of row {row} ({name}): mend image_std "
                "and image_mean in its preprocessor_config.json"
            )
        if self.shape not in (None, pixels.shape):
            a, b = (" x ".join(map(str, shape)) for shape in (pixels.shape, self.shape))
            raise InputError(
                f"the image processor makes {a} numbers of row {row} ({name}), but {b} of the first row: "
                "give images of one size, or a processor that resizes to one"
            )
        return pixels


def thumbnail(images: Images, row: int, side: int = 96) -> str:
    """A small JPEG of a row, at most `side` pixels wide and high, as a `data:` address.

    Args:
        images: what `load_images` returned.
        row: its number.

    Raises:
        InputError: the image cannot be read by now.
    """
    pixels: Any = images.pixels
    number = int(images.numbers[row])
    name, data = pixels.files.read(number)
    try:
        image, buffer = _decoded(data, "RGB"), BytesIO()
        image.thumbnail((side, side))
        image.save(buffer, "JPEG", quality=75)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like
        raise _unreadable(number, name, error) from error
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _unreadable(row: int, name: str, error: Exception) -> InputError:
    return InputError(
        f"row {row} ({name}) cannot be made into pixels ({summary(error)}): correct the image or leave it out"
    )


def _decoded(data: bytes, mode: str) -> Any:
    """An upright image of 8 bits a channel."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(_opened(data))
    if image.mode[0] in "IF":
        raise ValueError(f"its mode is {image.mode}, not one of 8 bits")
    if image.mode == "P":  # RGB has no place for the transparency that a palette may have
        image = image.convert("RGBA")
    return image.convert(mode)


def _opened(data: bytes) -> Any:
    """An image of one of the known formats: Pillow gives others, PostScript say, to other programs."""
    from PIL import Image

    Image.init()
    return Image.open(BytesIO(data), formats=[one for one in FORMATS if one in Image.OPEN])


def _inspect(files: _Files) -> tuple[list[str], list[str]]:
    """The name of every image and a digest of its bytes; a file without the header of an image is refused."""
    names, digests = [], []
    for row in watched("reading images", range(len(files.rows)), "images"):
        name, data = files.read(row)
        try:
            with _opened(data) as image:
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
    check_column(rows, column, "give the column of images as image_column")
    return column


def _encoded(rows: "datasets.Dataset", column: str) -> "datasets.Dataset":
    """The column alone, as bytes and path."""
    import datasets

    feature: Any = rows.features[column]
    known = isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in _PLAIN
    if not known and not (isinstance(feature, dict) and set(feature) == {"bytes", "path"}):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise InputError(f"column {column!r} holds {kind}, not images or paths: give another image_column")
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
