"""What kernels stand on: the machine's instructions, compiled code, memory, threads' words."""
