"""The convertd daemon: four processes that convert disk images for callers without rights."""

# Here, and not asked of importlib.metadata: that loads zipfile and email, 3 MB that forks copy.
__version__ = "0.1.0"
