"""`python -m logshift.converter.cli`: the command `logshift`."""

from logshift.converter.cli import main

main()
