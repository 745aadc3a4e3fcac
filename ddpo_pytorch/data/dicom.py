"""Read DICOM files; requires pydicom (the extra "dicom")."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from ddpo_pytorch.utils.errors import UserError


def read_dicom(file: BinaryIO, path: str | Path) -> Image.Image:
    """Decode a DICOM file to RGB by its first window or, if it has none, with black and white at the ends of its range.

    Raises UserError if pydicom is missing, for several images, and if an image without a window would be nearly black.
    """
    try:
        from pydicom import dcmread, pixels
    except ImportError as error:
        raise UserError(f"{str(path)!r} is a DICOM file, which needs pydicom: pip install -e '.[dicom]'") from error
    header = dcmread(file)
    if (frames := int(header.get("NumberOfFrames") or 1)) > 1:
        raise UserError(f"{str(path)!r} holds {frames} images; save one of them as 8-bit RGB")
    levels, kind = pixels.pixel_array(header), header.PhotometricInterpretation
    half, ends = 2 ** (header.BitsStored - 1), (0, 2**header.BitsStored - 1)
    if kind.startswith("MONOCHROME"):
        if tables := header.get("VOILUTSequence") or header.get("ModalityLUTSequence"):
            ends = 0, 2 ** tables[0].LUTDescriptor[2] - 1
        else:
            stored = (-half, half - 1) if header.PixelRepresentation else ends
            ends = pixels.apply_modality_lut(np.array(stored), header)
        levels = pixels.apply_voi_lut(pixels.apply_modality_lut(levels, header), header)
    elif kind == "PALETTE COLOR":
        levels = pixels.apply_color_lut(levels, header)
        ends = 0, np.iinfo(levels.dtype).max
    black, white = ends
    shares = (levels.astype(float) - black) / (white - black)
    if 0 < shares.max() <= 1 / 16 and "WindowCenter" not in header:
        problem = f"has no window and no level above {levels.max()}, where white is {white}"
        raise UserError(f"{str(path)!r} {problem}; convert it to 8-bit RGB with the intended window")
    shares = (1 - shares if kind == "MONOCHROME1" else shares).clip(0, 1)
    return Image.fromarray(np.rint(255 * shares).astype(np.uint8)).convert("RGB")
