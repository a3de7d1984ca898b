"""What is counted of a network's answers, batch by batch, and what follows from the counts. Shares are in percent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparse_lab.errors import UserError

BINS = 15
TOP = 5
BINNING = (
    f"{BINS} bins of equal width by the largest softmax probability, mean of |accuracy - confidence| weighted by "
    "images (Guo et al. 2017, arXiv 1706.04599)"
)


class Tally:
    """Counts over batches.

    confusion: int64 [classes, classes], images by true class (row) and predicted class (column). bins: float64
    [3, BINS], of the calibration's bins the images, the hits and the summed confidence.
    """

    def __init__(self, classes: int) -> None:
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)
        self.loss = 0.0
        self.among_first = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits [N, classes], labels int64 [N]. Raise UserError for other logits, or such as are no
        numbers.
        """
        logits, labels = logits.detach().to("cpu", torch.float64), labels.cpu()
        classes = len(self.confusion)
        if logits.shape != (len(labels), classes):
            raise UserError(
                f"the network answers {len(labels)} images by numbers of shape {list(logits.shape)}, not {classes} each"
            )
        if not (sound := logits.isfinite().all(1)).all():
            raise UserError(f"the network's answer to {int((~sound).sum())} of {len(labels)} images is NaN or infinite")
        predicted = logits.argmax(1)
        self.confusion += (labels * classes + predicted).bincount(minlength=classes**2).view(classes, classes)
        self.loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        self.among_first += int((_places(logits, labels) < TOP).sum())
        confidence = logits.softmax(1).amax(1)
        here = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # each bin without its lower end
        rows = torch.stack([torch.ones_like(confidence), (predicted == labels).double(), confidence])
        self.bins.index_add_(1, here, rows)

    def found(self) -> dict[str, Any]:
        """Return top-1 and, of more than five classes, top-5 accuracy, accuracy over the classes alike, mean loss and
        calibration. Classes without an image count for nothing.
        """
        images, hits = self.confusion.sum(1), self.confusion.diagonal()
        count, there = int(images.sum()), images > 0
        top5 = {"top5": 100 * self.among_first / count} if len(images) > TOP else {}
        return {
            "images": count,
            "top1": 100 * int(hits.sum()) / count,
            **top5,
            "balanced_accuracy": 100 * float((hits[there] / images[there].double()).mean()),
            "loss": self.loss / count,
            "calibration_error": 100 * self._calibration_error(),
            "calibration": {"binning": BINNING, "bins": self._filled_bins()},
        }

    def _calibration_error(self) -> float:
        images, hits, confidence = self.bins
        return float((hits - confidence).abs().sum() / images.sum())

    def _filled_bins(self) -> list[dict[str, float]]:
        return [
            {
                "above": number / BINS,
                "to": (number + 1) / BINS,
                "images": int(images),
                "accuracy": 100 * hits / images,
                "confidence": 100 * confidence / images,
            }
            for number, (images, hits, confidence) in enumerate(self.bins.T.tolist())
            if images
        ]


def _places(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes stand before the true one, where ties go by number: int64 [N]."""
    true = logits.gather(1, labels[:, None])
    numbers = torch.arange(logits.shape[1])
    before = (logits > true) | ((logits == true) & (numbers < labels[:, None]))
    return before.sum(1)
