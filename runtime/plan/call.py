"""One kernel call of a plan, told by names: before tensors have places and kernels addresses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from logshift.runtime.plan.convolution import Convolution
from logshift.runtime.plan.work import ELEMENT


@dataclass(slots=True)
class Call:
    """What one kernel is to do.

    Attributes
    ----------
    op : str
        Operation of the kernel.
    tensors : mapping of field of the argument record to name of a tensor
    fields : dict
        Other fields; an array stands for its address. `n`, `height`, `width` and `channels` are
        of what is computed.
    work : int
        Of one element of that, see `work`.
    moved : mapping of field to (rows, columns), optional
        The pictures of these tensors begin so much further.
    convolution : Convolution, optional
        Which kernel it is then, and what else its argument record holds.
    """

    op: str
    tensors: Mapping[str, str]
    fields: dict[str, Any]
    work: int = ELEMENT
    moved: Mapping[str, tuple[int, int]] | None = None
    convolution: Convolution | None = None

    @property
    def writes(self) -> tuple[str, ...]:
        """Names of the tensors that it writes."""
        return tuple(name for key, name in self.tensors.items() if key.startswith("y"))

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the tensors that it reads."""
        return tuple(name for key, name in self.tensors.items() if not key.startswith("y"))


def writes_of(calls: Sequence[Call]) -> tuple[str, ...]:
    """Return the names of the tensors that some calls write."""
    return tuple(dict.fromkeys(name for call in calls for name in call.writes))


def reads_of(calls: Sequence[Call]) -> tuple[str, ...]:
    """Return the names of the tensors that some calls read, but for what they write themselves."""
    own = writes_of(calls)
    return tuple(dict.fromkeys(n for call in calls for n in call.reads if n not in own))
