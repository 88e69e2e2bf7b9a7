"""The definition of every kernel, in plain loops."""
