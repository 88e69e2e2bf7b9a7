"""What a step of training costs: the published method against the residual penalty, in turns.

    python -m benchmarks.training_step

ResNet-20 for CIFAR-10 at W4A4, batch 128, in float32 and in bfloat16, on 1 and 2 threads. Medians
and quartiles.
"""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from benchmarks.machine import describe
from logshift import trainer
from logshift.trainer.fit import make_optimisers
from logshift.trainer.models import MODELS
from logshift.trainer.settings import Training

ROUNDS, STEPS = 8, 2
CASES = {
    "residual penalty": trainer.Config(method="residual_penalty", weight_bits=4, activation_bits=4),
    "published": trainer.Config(weight_bits=4, activation_bits=4),
    "published, tiles": trainer.Config(weight_bits=4, activation_bits=4, granularity="tile"),
    "float": None,
}

console = Console()


class Case:
    """A network with its optimisers; `step` is one of training, as `logshift-train` makes it."""

    def __init__(self, config: trainer.Config | None, precision: torch.dtype) -> None:
        self.config, self.precision = config, precision
        random = torch.Generator().manual_seed(1)
        x = torch.randn(128, 3, 32, 32, generator=random)
        self.x = x.to(memory_format=torch.channels_last)
        self.target = torch.randint(0, 10, (128,), generator=random)
        network: nn.Module = MODELS["resnet20_cifar"](shortcut="pad")
        if config is not None:
            network = trainer.prepare(network, config)
            trainer.calibrate(network, [x[:32]])
        self.network = network.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.optimisers = make_optimisers(network, Training(), config, 1000)

    def step(self) -> None:
        """Make a step."""
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        with torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32):
            loss = F.cross_entropy(self.network(self.x), self.target)
            if self.config is not None:
                loss = loss + self.config.regularisation * trainer.regulariser(self.network)
        loss.backward()
        for optimiser in self.optimisers:
            optimiser.step()
        if self.config is not None:
            trainer.fade(self.network)

    def seconds(self) -> float:
        """Return the time of a step."""
        begin = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        return (time.perf_counter() - begin) / STEPS


def main() -> None:
    """Print the ratios."""
    table = Table("precision", "threads", *list(CASES)[1:], title="times the residual penalty")
    for precision in (torch.float32, torch.bfloat16):
        cases = [Case(config, precision) for config in CASES.values()]
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for case in cases:
                case.step()
            rounds = track(range(ROUNDS), f"{precision}, {threads} threads", transient=True)
            times = np.array([[case.seconds() for case in cases] for _ in rounds])
            ratios = np.percentile(times[:, 1:] / times[:, :1], [25, 50, 75], axis=0).T
            shown = [f"{middle:.2f} ({low:.2f} to {high:.2f})" for low, middle, high in ratios]
            table.add_row(str(precision), str(threads), *shown)
    console.print(describe(), table)


if __name__ == "__main__":
    main()
