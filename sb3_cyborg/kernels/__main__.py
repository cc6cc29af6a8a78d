"""``python -m sb3_cyborg.kernels``: build the library of kernels where the installation could not."""

from sb3_cyborg.kernels.build import main

main()
