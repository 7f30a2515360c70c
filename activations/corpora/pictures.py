"""Pictures of a corpus, one at a time, from files."""

import glob
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from activations.corpora.documents import CorpusConfig, Document, whole
from activations.corpora.sequences import mark_of
from saescope.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def pictures(config: CorpusConfig, *, first: int = 0) -> Iterator[Document]:
    """Every picture of a corpus, in a fixed order: its file is its key, its sha256 its text.

    So equal pictures are on the same side of the held-out split, as equal texts are. Raises
    InputError if there is no such file, or one is not a picture by its name.
    """
    pattern = str(Path(config.source).expanduser())
    paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    paths = [path for path in paths if path.is_file()]
    strange = [path for path in paths if path.suffix.lower() not in SUFFIXES]
    if strange or not paths:
        raise InputError(
            "not a picture, by its name" if strange else "no such file",
            where="corpus.source",
            given=str(strange[0]) if strange else config.source,
            allowed=f"a pattern such as photos/**/*.png, of files ending in {', '.join(SUFFIXES)}",
        )
    for number, path in enumerate(paths, first):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if whole(str(path)) != str(path):
            raise InputError("its name is not UTF-8: give it another", where=whole(str(path)))
        yield Document(number, str(path), digest, path.stem)


def read_picture(path: str, digest: str) -> "Image":
    """A picture, in colour, upright. Raises InputError if it is damaged or has changed."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        content = Path(path).read_bytes()
        picture = Image.open(io.BytesIO(content))
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise InputError(f"not a readable picture: {error}", where=path) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise InputError("the picture has changed since it was counted", where=path)
    return upright


def thumbnail(path: str, mark: int, size: int) -> bytes:
    """A picture as JPEG, no side longer than `size` pixels.

    Raises InputError if it is not there, is damaged, or is another than the one of this mark.
    """
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"not a readable picture: {error}", where=path) from error
    if mark_of(digest) != mark:
        raise InputError("the picture has changed since it was harvested", where=path)
    picture = read_picture(path, digest)
    picture.thumbnail((size, size))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return stream.getvalue()
