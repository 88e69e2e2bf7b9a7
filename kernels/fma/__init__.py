"""The fma family: convolutions on float32, on the machine's fused multiply-add."""
