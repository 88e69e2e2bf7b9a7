"""What adds rows of the shift family, as a microkernel that `cross` can compile."""

from logshift.kernels.machine.emit import Emitter
from logshift.kernels.shift.adders import ADDERS, Addition


def emit(name, builder, arguments):
    """Emit an adder; takes the address of its three addresses."""
    k, e = ADDERS[name], Emitter(builder)
    addition = Addition(builder, k.vector, k.vectors, k.vector, k.lanes, k.group)
    addition.emit(*(e.at(arguments, index) for index in range(3)))
