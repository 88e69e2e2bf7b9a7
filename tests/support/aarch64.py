"""Compiling for aarch64 on any machine."""

import llvmlite.binding as llvm

_DOT = """
declare <4 x i32> @llvm.aarch64.neon.{0}.v4i32.v16i8(<4 x i32>, <16 x i8>, <16 x i8>)
define <4 x i32> @f(<4 x i32> %a, <16 x i8> %b, <16 x i8> %c) {{
  %r = call <4 x i32> @llvm.aarch64.neon.{0}.v4i32.v16i8(<4 x i32> %a, <16 x i8> %b, <16 x i8> %c)
  ret <4 x i32> %r
}}
"""
# IR of a function that needs a feature, or is compiled otherwise without it.
INSTRUCTIONS = {
    "dotprod": _DOT.format("sdot"),
    "i8mm": _DOT.format("usdot"),
    "lse": """
define i64 @f(ptr %p, i64 %v) {
  %r = atomicrmw add ptr %p, i64 %v seq_cst
  ret i64 %r
}
""",
}


def assembly(text, cpu, features):
    """Assembly of IR; LLVM ends the process where the CPU has no instruction for it."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple = "aarch64-unknown-linux-gnu"
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3
    )
    module = llvm.parse_assembly(f'target triple = "{triple}"\n{text}')
    module.verify()
    return machine.emit_assembly(module)
