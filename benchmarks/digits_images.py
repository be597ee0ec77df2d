"""scikit-learn's handwritten digits as images in class folders, for `litconvert latents encode`.

    python -m benchmarks.digits_images digits/

8x8 upsampled to 16x16 as the embedded teacher saw them, rounded to 8 bits: 1,797 files, digits/0/0000.png and so on.
"""

import sys
from pathlib import Path

from PIL import Image

from benchmarks.train_digits_classifier import digits


def write_images(folder: Path) -> int:
    """Write all images into a folder for each class; returns how many."""
    images, labels = digits()
    values = ((images[:, 0] + 1) * 127.5).round().clamp(0, 255).byte().numpy()
    for index, (image, label) in enumerate(zip(values, labels.tolist(), strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return len(values)


if __name__ == "__main__":
    print(f"{write_images(Path(sys.argv[1])):,} images in {sys.argv[1]}")
