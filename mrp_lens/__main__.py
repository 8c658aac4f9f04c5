"""`python -m mrp_lens`, the command line, for launchers that start modules: `torchrun -m mrp_lens unlearn ...`."""

from mrp_lens.cli import main

main()
