"""Pallas kernels, a package for each family of machines; nothing in here is public."""
