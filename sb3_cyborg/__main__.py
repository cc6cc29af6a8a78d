"""``python -m sb3_cyborg``: the command line, as ``sb3-cyborg``."""

from sb3_cyborg.cli import main

main()
