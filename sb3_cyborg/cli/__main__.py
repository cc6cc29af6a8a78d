"""``python -m sb3_cyborg.cli``: the command line, as ``python -m sb3_cyborg``."""

from sb3_cyborg.cli import main

main()
