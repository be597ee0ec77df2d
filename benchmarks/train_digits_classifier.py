"""Train `digits-classifier.safetensors`, whose features and verdicts measure the digits model.

    python -m benchmarks.train_digits_classifier

scikit-learn's handwritten digits, 8x8 upsampled to 16x16 and scaled to [-1, 1] as the teacher was trained; 1,437 images
to train on and 360 to test on. Full-batch AdamW, seeded: a few seconds, and the accuracy on the test images is printed.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from litconvert.checkpoints.writing import LazyTensors, write_safetensors
from litconvert.evaluation.networks import DigitsClassifier

TEST_IMAGES = 360

ASSETS = Path(__file__).parents[1] / "litconvert" / "assets"


def digits() -> tuple[Tensor, Tensor]:
    """All images (1797, 1, 16, 16) in [-1, 1], and their labels, in a fixed shuffled order."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)
    return images[order], torch.tensor(data.target, dtype=torch.int64)[order]


def train(steps: int = 400) -> tuple[DigitsClassifier, float]:
    """The classifier, and its accuracy on the test images."""
    images, labels = digits()
    torch.manual_seed(0)
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    train_images, train_labels = images[TEST_IMAGES:], labels[TEST_IMAGES:]
    for step in range(steps):
        # Noise keeps the decision away from single pixels; samples of a model are never exactly digits.
        noisy = train_images + 0.2 * torch.randn(train_images.shape, generator=torch.Generator().manual_seed(step))
        loss = F.cross_entropy(model(noisy), train_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    with torch.inference_mode():
        accuracy = (model(images[:TEST_IMAGES]).argmax(1) == labels[:TEST_IMAGES]).float().mean().item()
    return model, accuracy


def main() -> None:
    """Write the asset into the package."""
    torch.set_num_threads(1)
    model, accuracy = train()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    out = ASSETS / "digits-classifier.safetensors"
    write_safetensors(out, LazyTensors.of(state), {"format": "pt", "test_accuracy": f"{accuracy:.4f}"})
    print(f"{out}: accuracy {accuracy:.1%} on {TEST_IMAGES} test images")


if __name__ == "__main__":
    main()
