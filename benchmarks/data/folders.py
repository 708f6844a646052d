"""Photographs and their masks in any two folders, for data sets that are not IDRiD."""

from pathlib import Path

from data import hei_med
from data.idrid import DataError, Files

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}


def paired_files(images: Path, masks: Path) -> list[Files]:
    """Each picture of the first folder, by name, with its mask in the second, None where there is none.

    A mask has its photograph's name, with or without something behind it that begins with "_", "-" or ".": the mask
    of C0001.jpg may be C0001.png, C0001_EX.tif or C0001.lesion.gif. If the second folder holds maps of HEI-MED, they
    are the masks; photographs without a map are left out, and pictures in that folder are not read as masks.

    Raises:
        DataError: a folder is absent or holds no picture, a photograph has several masks, or a mask no photograph.
    """
    maps = sorted(path for path in masks.glob(f"*{hei_med.SUFFIX}") if not path.name.startswith("."))
    if maps:
        pairs = [Files(images / f"{own.name.removesuffix(hei_med.SUFFIX)}.jpg", own) for own in maps]
        for pair in pairs:
            if not pair.image.is_file():
                raise DataError(f"'{pair.mask}' must have its photograph at '{pair.image}', but there is none")
        return pairs
    photographs, others = _pictures("--images", images), _pictures("--masks", masks)
    found: dict[Path, list[Path]] = {photograph: [] for photograph in photographs}
    for mask in others:
        owners = [photograph for photograph in photographs if _belongs(mask.name, photograph.stem)]
        if not owners:
            raise DataError(f"'{mask}' must begin with the name of a photograph in '{images}', but none matches")
        found[max(owners, key=lambda owner: len(owner.stem))].append(mask)
    for photograph, own in found.items():
        if len(own) > 1:
            names = ", ".join(mask.name for mask in own)
            raise DataError(f"'{masks}' must hold one mask for {photograph.name}, but it holds {names}")
    return [Files(photograph, own[0] if own else None) for photograph, own in found.items()]


def _belongs(name: str, stem: str) -> bool:
    return name.startswith(stem) and name[len(stem) :].startswith(("_", "-", "."))


def _pictures(option: str, folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{option} must be a folder of pictures, but '{folder}' is not a folder")
    pictures = sorted(
        path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not pictures:
        raise DataError(
            f"{option} must be a folder of pictures ({', '.join(sorted(SUFFIXES))}), but '{folder}' has none"
        )
    return pictures
