"""The command `logshift-train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from lightning_fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console
from rich.table import Table

from logshift.trainer import settings as settings_module
from logshift.trainer.config import Config
from logshift.trainer.data import DataError, open_data
from logshift.trainer.fit import RunError, fit
from logshift.trainer.models import ModelError
from logshift.trainer.quantize import PrepareError
from logshift.trainer.settings import SettingsError


def _list(wanted: bool) -> None:
    if wanted:
        found = {name: settings_module.read(name) for name in settings_module.recipes()}
        table = Table(
            "recipe",
            "data",
            "bits + two words",
            "expected",
            box=None,
            pad_edge=False,
            collapse_padding=True,
        )
        table.columns[0].no_wrap = True  # names are copied
        for task in dict.fromkeys(chosen.task for chosen in found.values()):
            table.add_row()
            table.add_row(f"[bold]{task}[/]")
            for name, chosen in found.items():
                if chosen.task == task:
                    expected = settings_module.expected(name)
                    table.add_row(name, chosen.data, _words(chosen.quantization), expected)
        console.print(table)
        console.print(
            '\npaper: Oh, Sim, Lee, Lee, "Automated Log-Scale Quantization for Low-Cost Deep '
            'Neural Networks", CVPR 2021; measured: with this package, docs/training.md',
            highlight=False,
        )
        raise typer.Exit


def _words(config: Config | None) -> str:
    """Return the bits of weights and activations, and the shares that may have a second word."""
    if config is None:
        return "float"
    shares = {config.residual_ratio}
    shares |= {c.residual_ratio for c in config.layers.values() if c.residual_ratio is not None}
    shown = ", ".join(f"{100 * share:g}" for share in sorted(shares))
    what = "" if config.granularity == "element" else f" of {config.granularity}s"
    return f"W{config.weight_bits}A{config.activation_bits} + {shown} %{what}"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="A TOML file of settings, or a packaged recipe's name.")
    ],
    data: Annotated[Path, typer.Option(help="Folder or file of the data set.")],
    out: Annotated[Path, typer.Option(help="Folder for logs, checkpoint and model.onnx.")],
    weights: Annotated[
        Path | None, typer.Option(help="Float weights to begin with, .pth or .safetensors.")
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint in OUT.")] = False,
    list_recipes: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="List packaged recipes.")
    ] = False,
) -> None:
    """Train a network with power-of-two weights and write it as ONNX.

    Examples
    --------
    - `logshift-train resnet20-cifar10 --data cifar10/ --weights float.pt --out w4`

    - `logshift-train resnet20-cifar10 --data cifar10/ --weights float.pt --out w3a5
      --set quantization.weight_bits=3 --set quantization.activation_bits=5`

    - `logshift-train resnet20-cifar10 --data cifar10/ --out w4 --resume`
    """
    changes = list(change or [])
    try:
        chosen = settings_module.read(recipe, changes)
        if weights is not None:
            chosen = chosen.model_copy(update={"weights": weights})
        summary = fit(chosen, open_data(chosen.data, data, chosen.data_options), out, resume=resume)
    except (SettingsError, DataError, ModelError, PrepareError, RunError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    _show(summary, out)


@rank_zero_only
def _show(summary: dict[str, Any], out: Path) -> None:
    table = Table("measure", "value", title=str(out / "model.onnx"))
    for key, value in summary.items():
        if key == "layers":
            continue
        table.add_row(key, f"{value:.4f}" if isinstance(value, float) else str(value))
    console.print(table)
    if layers := summary.get("layers"):
        table = Table("layer", "weights", "NZR %", "bits per weight")
        for name, layer in layers.items():
            nzr = f"{100 * layer['nzr']:.1f}"
            table.add_row(name, f"{layer['weights']:,}", nzr, f"{layer['bits_per_weight']:.2f}")
        console.print(table)


def main() -> None:
    """Run the command."""
    app()


if __name__ == "__main__":
    main()
