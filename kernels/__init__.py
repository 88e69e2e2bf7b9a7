"""Arrays in, arrays out: the STLQ codec, bit packing, and the kernels of every operation."""
