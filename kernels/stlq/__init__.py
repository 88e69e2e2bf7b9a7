"""The STLQ code: weights as first and second log-exponent words, and their bits in a file."""
