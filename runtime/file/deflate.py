"""Deflated bytes: as small as a reader accepts, and never more memory than a file may claim."""

from __future__ import annotations

import zlib

from logshift.kernels.errors import FormatError

# What bytes may expand to, times their compressed size. RFC 1951 allows 1032, which would let a
# file of one megabyte claim gigabytes; what is worth storing never gets near this.
_MAX_RATIO = 64


def deflate(raw: bytes) -> bytes:
    """Return the smallest zlib stream of `raw` that `inflate` accepts."""
    # Codes have no repeats worth finding: Huffman coding alone usually beats matching here.
    # It cannot shrink eight times, so there is always one that readers accept.
    return min(
        (
            packed
            for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)
            if len(raw) <= _MAX_RATIO * len(packed := _zlib(raw, strategy))
        ),
        key=len,
    )


def _zlib(raw: bytes, strategy: int) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, 15, 9, strategy)
    return compressor.compress(raw) + compressor.flush()


def inflate(packed: bytes, size: int, where: str) -> bytes:
    """Return the `size` bytes that a zlib stream holds.

    Raises
    ------
    FormatError
        If it is damaged, holds more or fewer, or expands too much; says where.
    """
    if size > len(packed) * _MAX_RATIO:
        raise FormatError(f"{where}: {len(packed)} bytes cannot inflate to {size}")
    decompressor = zlib.decompressobj()
    try:
        data = decompressor.decompress(packed, size + 1)
    except zlib.error as error:
        raise FormatError(f"{where}: damaged zlib stream ({error})") from error
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise FormatError(f"{where}: the zlib stream does not hold exactly {size} bytes")
    return data
