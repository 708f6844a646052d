"""The photographs that a run's settings ask for."""

from pathlib import Path

from data.photographs import photographs
from data.samples import Sample
from data.tiles import tiles

from trials.objective import Settings


def samples_of(settings: Settings, data: Path, split: str, cache: Path) -> list[Sample]:
    """Those of a split, "train" or "test".

    Raises:
        DataError: as photographs and tiles.
    """
    return tiles(data, split) if settings.data == "tiles" else photographs(data, split, settings.size, cache)
