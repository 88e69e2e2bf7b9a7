"""What is learned: a loss, and what the result is measured by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from logshift.trainer.data.pictures import VOID


@dataclass(frozen=True)
class Task:
    """Base of the tasks.

    Attributes
    ----------
    classes : int
    label_smoothing : float
    weights : float32 Tensor of shape (classes,), optional
        Of the classes in the loss.
    """

    classes: int = 0
    label_smoothing: float = 0.0
    weights: Tensor | None = None

    learning = ""  # name of the measure of training batches

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of a batch."""
        raise NotImplementedError

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the measure of one training batch, to be logged."""
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        """Return the measures of a test set by name."""
        raise NotImplementedError


class Classification(Task):
    """Cross entropy; the share of examples whose most probable class is right."""

    learning = "top1"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross entropy of logits (N, classes) against class numbers (N,)."""
        return F.cross_entropy(output, target, self.weights, label_smoothing=self.label_smoothing)

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the share that is right."""
        return (output.argmax(1) == target).float().mean()

    def metrics(self) -> MetricCollection:
        """Return top-1, and top-5 if there are more than ten classes."""
        metrics = MetricCollection({"top1": MulticlassAccuracy(self.classes, average="micro")})
        if self.classes > 10:
            metrics["top5"] = MulticlassAccuracy(self.classes, top_k=5, average="micro")
        return metrics


class Segmentation(Task):
    """Cross entropy of every pixel; mean intersection over union of the classes."""

    learning = "pixels"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the cross entropy of (N, classes, H, W) against (N, H, W)."""
        return F.cross_entropy(
            output,
            target,
            self.weights,
            ignore_index=VOID,
            label_smoothing=self.label_smoothing,
        )

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the share of pixels that is right."""
        counted = target != VOID
        right = (output.argmax(1) == target) & counted
        return right.sum() / counted.sum().clamp_min(1)

    def metrics(self) -> MetricCollection:
        """Return the mean IoU over all pictures together, and the share of pixels that is right."""
        return MetricCollection(
            {
                "miou": MulticlassJaccardIndex(self.classes, ignore_index=VOID),
                "pixels": MulticlassAccuracy(self.classes, average="micro", ignore_index=VOID),
            }
        )


class Enhancement(Task):
    """Mean absolute error; peak signal-to-noise ratio and structural similarity."""

    learning = "psnr"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the mean absolute error of pictures (N, 3, H, W) in 0 to 1."""
        return F.l1_loss(output, target)

    def measure(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the PSNR of the batch in dB."""
        return -10 * torch.log10(F.mse_loss(output.clamp(0, 1), target).clamp_min(1e-10))

    def metrics(self) -> MetricCollection:
        """Return PSNR, the mean of the pictures' in dB, and SSIM."""
        psnr = PeakSignalNoiseRatio(
            data_range=(0.0, 1.0), dim=(1, 2, 3), reduction="elementwise_mean"
        )
        ssim = StructuralSimilarityIndexMeasure(data_range=(0.0, 1.0))
        return MetricCollection({"psnr": psnr, "ssim": ssim})


TASKS = {
    "classification": Classification,
    "segmentation": Segmentation,
    "enhancement": Enhancement,
}
