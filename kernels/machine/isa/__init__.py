"""Instruction sets, a file for each, behind the interface of `base.InstructionSet`."""
