"""Which files a name inside a checkpoint may mean: those of the checkpoint, and no others."""

from pathlib import Path


def is_contained(directory: Path, name: object) -> bool:
    """Whether ``directory / name`` lies in ``directory`` when all links are followed, be it there or not; opens nothing.

    ``directory`` itself may be a link. A snapshot in Hugging Face's cache consists of links to the ``blobs`` beside it, which count too.
    """
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        return False
    try:
        root = directory.resolve()
        place = (directory / name).resolve()
    except (OSError, ValueError, RuntimeError):  # an unreadable folder, a NUL byte, a circle of links
        return False
    blobs = root.parent.parent / "blobs"
    return place.is_relative_to(root) or (root.parent.name == "snapshots" and place.parent == blobs)
