"""The exudate masks of HEI-MED, whose folder DMED holds photographs, maps of labelled areas and the labels' names.

    DMED/(00000003).jpg
    DMED/(00000003).map.gz      int32: a number that is not used, width, height, then the label of each pixel, by rows
    DMED/(00000003).GND         the number of labels, then one line per label, such as "Exudate 1", then other lines

Label n is named by the n-th of these lines; 0 is background. A labelled area may hold several lesions.

Reference: Giancardo et al. 2012, Medical Image Analysis 16(1), doi 10.1016/j.media.2011.07.004.
"""

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

SUFFIX = ".map.gz"
LESION = "Exudate"


def read_map(path: Path) -> npt.NDArray[np.bool_]:
    """Where a map has an area that its .GND calls an exudate, (H, W).

    Raises:
        OSError, EOFError, ValueError, zlib.error: a file cannot be read, or the two do not fit each other.
    """
    with gzip.open(path) as file:
        numbers = np.frombuffer(file.read(), "<i4")
    width, height = map(int, numbers[1:3])
    labels = numbers[3:].reshape(height, width)
    first, *lines = path.with_name(path.name.removesuffix(SUFFIX) + ".GND").read_text("latin-1").splitlines()
    names = lines[: int(first)]
    if labels.min() < 0 or labels.max() > len(names):
        raise ValueError(f"its labels are {labels.min()} to {labels.max()}, but its .GND names {len(names)}")
    is_lesion = np.array([False, *(name.startswith(LESION) for name in names)])
    return np.asarray(is_lesion[labels])
