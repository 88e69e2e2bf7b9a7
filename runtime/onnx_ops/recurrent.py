"""What attributes of recurrent operators mean, whoever computes these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Blocks of rows in weights.
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
# Activation functions of one direction: what a node without any has.
DEFAULTS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
# By their names in lower case, which ONNX does not care about: the name, alpha and beta.
_FUNCTIONS = {
    name.lower(): (name, alpha, beta)
    for name, alpha, beta in (
        ("Affine", 1.0, 0.0), ("Elu", 1.0, 0.0), ("HardSigmoid", 0.2, 0.5),
        ("LeakyRelu", 0.01, 0.0), ("Relu", 0.0, 0.0), ("ScaledTanh", 1.0, 1.0),
        ("Sigmoid", 0.0, 0.0), ("Softplus", 0.0, 0.0), ("Softsign", 0.0, 0.0), ("Tanh", 0.0, 0.0),
        ("ThresholdedRelu", 1.0, 0.0),
    )
}  # fmt: skip
_OF_ALPHA = {"Affine", "Elu", "HardSigmoid", "LeakyRelu", "ScaledTanh", "ThresholdedRelu"}
_OF_BETA = {"Affine", "HardSigmoid", "ScaledTanh"}


def activations(
    op: str, attributes: Mapping[str, Any], directions: int
) -> list[tuple[str, float, float]] | None:
    """Return name, alpha and beta of the activation functions of all directions, in their order.

    Each function that has an alpha, or a beta, takes the next of those that are given; where there
    are none left it has its default. None if they are not what ONNX lists.
    """
    names = attributes.get("activations") or list(DEFAULTS[op]) * directions
    alphas, betas = (iter(attributes.get(f"activation_{n}") or ()) for n in ("alpha", "beta"))
    if not isinstance(names, list) or len(names) != len(DEFAULTS[op]) * directions:
        return None
    found = []
    for given in names:
        if str(given).lower() not in _FUNCTIONS:
            return None
        name, alpha, beta = _FUNCTIONS[str(given).lower()]
        alpha = next(alphas, alpha) if name in _OF_ALPHA else alpha
        beta = next(betas, beta) if name in _OF_BETA else beta
        found.append((name, float(alpha), float(beta)))
    return found
