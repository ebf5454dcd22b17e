"""Files of a kind that has no reader here, through datasets.load_dataset.

`datasets` converts them to Arrow files in its own cache. These are then read as others are.
"""

from __future__ import annotations

from pathlib import Path

from glassloop.data.folders import KINDS
from glassloop.data.hub import CURE
from glassloop.data.names import listed, shown
from glassloop.data.text_files import PACKED

ARCHIVES = (*PACKED, ".zip", ".rar", ".7z", ".lz4", ".tgz")


def arrow_files(
    place: str, config: str | None, split: str, revision: str | None, said: str
) -> tuple[Path, ...]:
    """Arrow files of a split, in order.

    Raises ValueError naming the field and value (`said`), with the reason of `datasets`.
    """
    packed = _packed(Path(place))
    if packed:
        raise ValueError(
            f"{said}: it holds no data file; {listed(packed, 3)} may hold any amount of data: "
            "unpack it and name the folder"
        )
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(place, name=config, split=split, revision=revision)
    except Exception as error:  # its builders raise what their libraries raise
        reason = shown(" ".join(str(error).split()), 300) or "no reason given"
        raise ValueError(
            f"{said}: it holds no data file; one must end in {', '.join(KINDS)} (text also "
            f"{', '.join(PACKED)}), or be of a kind that datasets.load_dataset reads. That says: "
            f"{reason} ({type(error).__name__})" + ("" if Path(place).is_dir() else f"; {CURE}")
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    return tuple(Path(file["filename"]) for file in loaded.cache_files)


def _packed(folder: Path) -> list[str]:
    """Archives in a local folder, by name."""
    return (
        sorted(path.name for path in folder.rglob("*") if path.suffix.lower() in ARCHIVES)
        if folder.is_dir()
        else []
    )
