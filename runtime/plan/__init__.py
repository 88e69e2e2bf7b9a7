"""From a packed graph and input shapes to a program."""
