"""The error of a rank that cannot go on; a module of its own, so that the command line knows it without PyTorch."""


class RankError(RuntimeError):
    """Another rank has failed, so this one cannot continue."""
