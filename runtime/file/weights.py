"""Quantized weights as a packed file holds them: packed and mostly deflated streams of words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from logshift.kernels.errors import FormatError, InputError
from logshift.kernels.machine.memory import arena
from logshift.kernels.stlq import bitpack, codec
from logshift.kernels.stlq.codec import LogWeights
from logshift.kernels.stlq.tiling import Tiling
from logshift.runtime.file.deflate import deflate, inflate
from logshift.runtime.file.manifest import TILES

_SPARE = 8  # bytes behind a stream that `codec.join_words` may read


@dataclass(frozen=True)
class Streams:
    """Weights of a layer as they lie in the file.

    Attributes
    ----------
    where : str
        Names the node, for errors.
    tensors : dict of name to array
        "alpha", "first", and what `manifest.POSITIONS` names.
    shape, bits, ... : what the manifest says, see `manifest.WORDS`
    group : int
        Groups of the convolution, which tiles of an array are cut by; 1 of other encodings.
    """

    where: str
    tensors: dict[str, np.ndarray]
    shape: tuple[int, int, int, int]
    bits: int
    residual_shift: int
    clip: int
    positions: str
    tile: int | tuple[int, int]
    zlib: frozenset[str]
    group: int = 1

    @property
    def count(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def array_tile(self) -> tuple[int, int] | None:
        """Inputs and outputs of an array's tiles, if second words are stored by these."""
        return self.tile if isinstance(self.tile, tuple) else None

    @property
    def tiling(self) -> Tiling:
        """These tiles."""
        assert isinstance(self.tile, tuple)
        return Tiling(self.shape, self.tile, self.group)

    def words(self) -> LogWeights:
        """Return the words themselves."""
        first, mask, second = self._unpacked()
        count = self.count
        words = np.zeros((2, count), np.uint8)
        words[0] = bitpack.unpack(first, self.bits, count)
        if mask.size:
            chosen = bitpack.unpack(mask, 1, count).view(bool)
            words[1, chosen] = bitpack.unpack(second, self.bits, int(np.count_nonzero(chosen)))
        return LogWeights(
            words[0].reshape(self.shape), words[1].reshape(self.shape), self.tensors["alpha"],
            self.bits, self.residual_shift, self.clip, self.array_tile,
        )  # fmt: skip

    def integers(self) -> tuple[np.ndarray, int, int]:
        """Return W as `LogWeights.integers` does, the largest |W| and the non-zero second words."""
        first, mask, second = self._unpacked()
        streams = _padded(first), mask.copy(), _padded(second)
        limit = codec.limit(self.bits, self.residual_shift, self.clip)
        dtype = codec.integer_type(limit)
        w = arena(self.count * dtype.itemsize).view(dtype)
        largest, nonzero, allowed = codec.join_words(*streams, self.bits, self.residual_shift, w)
        if not allowed:
            raise FormatError(f"{self.where}: a code is negative zero")
        if self.tensors["alpha"].size != self.shape[0]:
            raise FormatError(
                f"{self.where}: alpha has {self.tensors['alpha'].size} values, one is expected for"
                f" each of {self.shape[0]} output channels"
            )
        return w.reshape(self.shape), largest, nonzero

    def _unpacked(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First words, a bit for every weight or nothing at all, and second words."""
        count, nothing = self.count, np.empty(0, np.uint8)
        first = self._stream("first", count, self.bits)
        if self.positions == "none":
            return first, nothing, nothing
        if self.positions == "bitmap":
            mask = self._stream("position", count, 1)
        elif isinstance(self.tile, tuple):
            tiling = self.tiling
            bits = self._stream("position", tiling.count, 1)
            chosen = np.unpackbits(bits, count=tiling.count, bitorder="little").view(bool)
            mask = np.packbits(tiling.spread(chosen), bitorder="little")
        else:
            tiles = -(-count // self.tile)
            counts = self._stream("count", 2 * tiles, 8).view("<u2")
            positions = self._stream("position", int(counts.sum(dtype=np.int64)), 8)
            try:
                chosen = bitpack.mask_from_positions(counts, positions, self.tile, count)
            except InputError as error:
                raise FormatError(f"{self.where}: {error}") from None
            mask = np.packbits(chosen, bitorder="little")
        selected = int(_BITS_SET[mask].sum(dtype=np.int64))
        return first, mask, self._stream("second", selected, self.bits)

    def _stream(self, name: str, count: int, bits: int) -> np.ndarray:
        """Return a stream of `count` values of `bits` bits."""
        raw, size = self.tensors[name], bitpack.packed_size(count, bits)
        if name in self.zlib:
            raw = np.frombuffer(inflate(raw.tobytes(), size, f"{self.where}: {name}"), np.uint8)
        if raw.size != size:
            raise FormatError(f"{self.where}: {name} has {raw.size} bytes, expected {size}")
        try:
            bitpack.check_end(raw, bits, count)
        except InputError as error:
            raise FormatError(f"{self.where}: {error}") from None
        return raw


_BITS_SET = np.array([value.bit_count() for value in range(256)], np.uint8)


def _padded(stream: np.ndarray) -> np.ndarray:
    """Return a stream with bytes behind it."""
    padded = np.zeros(stream.size + _SPARE, np.uint8)
    padded[: stream.size] = stream
    return padded


def pack(weights: LogWeights, where: str, settings: dict[str, Any], group: int = 1) -> Streams:
    """Return weights as they are to lie in a file, second words in whichever form is smallest.

    `group` is the convolution's, which tiles of an array are cut by.
    """
    if isinstance(weights, StoredWeights):  # as it lies in the file: packing takes seconds
        if weights.tile is None or weights.streams.group == group:
            return weights.streams
        weights = weights.words()
    given = settings.get("tile")
    run = given if type(given) is int and 1 <= given <= codec.MAX_TILE else codec.MAX_TILE
    encoding, streams = "none", dict[str, tuple[np.ndarray, bool]]()
    mask, second = weights.second.ravel() != 0, weights.second.ravel()
    if mask.any():
        counts, positions = bitpack.tile_positions(mask, run)
        codes = _deflate({"second": bitpack.pack(second[mask], weights.bits)})
        choices = {
            "list": _deflate({"count": counts.view(np.uint8), "position": positions}) | codes,
            "bitmap": _deflate({"position": bitpack.pack(mask.astype(np.uint8), 1)}) | codes,
        }
        if weights.tile is not None:
            tiling = Tiling(weights.shape, weights.tile, group)
            chosen = tiling.any(mask.reshape(weights.shape))
            inside = tiling.spread(chosen).ravel()
            choices[TILES] = _deflate({
                "position": bitpack.pack(chosen.view(np.uint8), 1),
                "second": bitpack.pack(second[inside], weights.bits),
            })  # fmt: skip
        encoding = min(choices, key=lambda name: sum(a.size for a, _ in choices[name].values()))
        streams = choices[encoding]
    tile: int | tuple[int, int] = run
    if weights.tile is None or encoding != TILES:
        group = 1  # other encodings are the same whatever it is
    else:
        tile = weights.tile
    streams |= _deflate({"first": bitpack.pack(weights.first.ravel(), weights.bits)})
    tensors = {name: array for name, (array, _) in streams.items()}
    tensors["alpha"] = np.ascontiguousarray(weights.alpha, np.float32)
    deflated = frozenset(name for name, (_, deflated) in streams.items() if deflated)
    return Streams(
        where, tensors, weights.shape, weights.bits, weights.residual_shift, weights.clip,
        encoding, tile, deflated, group,
    )  # fmt: skip


def _deflate(streams: dict[str, np.ndarray]) -> dict[str, tuple[np.ndarray, bool]]:
    """Compress every stream that gets smaller by it."""
    result = {}
    for name, array in streams.items():
        smallest = deflate(raw := array.tobytes())
        deflated = len(smallest) < len(raw)
        result[name] = (np.frombuffer(smallest if deflated else raw, np.uint8), deflated)
    return result


class StoredWeights(LogWeights):
    """Weights that stay as they lie in the file; codes are decoded anew whenever asked for.

    Their one reader is usually the packing for a kernel, and once packed they are needed no more.

    Parameters
    ----------
    streams : Streams
        They are validated.
    keep : int
        How many ask for the integers first: they are kept for these.

    Raises
    ------
    FormatError
    """

    streams: Streams
    _largest: int
    _nzr: float
    _sums: np.ndarray
    _integers: np.ndarray | None
    _keep: int

    def __init__(self, streams: Streams, keep: int) -> None:
        w, largest, nonzero = streams.integers()
        sums = codec.channel_sums(w.reshape(len(w), -1))
        vars(self).update(
            alpha=streams.tensors["alpha"], bits=streams.bits, clip=streams.clip,
            residual_shift=streams.residual_shift, streams=streams, _largest=largest,
            tile=streams.array_tile, _nzr=nonzero / w.size, _sums=sums,
            _integers=w if keep else None, _keep=keep,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what a pickle holds: the streams."""
        return StoredWeights, (self.streams, 0)

    def __getattr__(self, name: str) -> Any:
        """Decode `first` or `second`."""
        if name not in ("first", "second"):
            raise AttributeError(name)
        return getattr(self.words(), name)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(O, kh, kw, C / group)."""
        return self.streams.shape

    @property
    def nzr(self) -> float:
        """Share of weights with a second word."""
        return self._nzr

    @property
    def largest(self) -> int:
        """Largest |W|."""
        return self._largest

    def sums(self) -> np.ndarray:
        """Return the sums of W and of |W| of every output channel."""
        return self._sums

    def words(self) -> LogWeights:
        """Return the weights with their words as arrays."""
        self._take()
        return self.streams.words()

    def integers(self) -> np.ndarray:
        """Return W; nothing is kept for the next time but what `keep` asks for."""
        kept = self._take()
        return self.streams.integers()[0] if kept is None else kept

    def _take(self) -> np.ndarray | None:
        kept, left = self._integers, self._keep - 1
        vars(self).update(_keep=left, _integers=kept if left > 0 else None)
        return kept
