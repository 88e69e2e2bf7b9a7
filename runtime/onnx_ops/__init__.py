"""ONNX operators in ONNX's form, for what a packed network need not quantize."""
