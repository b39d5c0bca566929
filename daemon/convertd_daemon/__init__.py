"""The convertd daemon: four processes that convert disk images for callers without rights."""
