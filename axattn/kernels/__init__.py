"""Pallas kernels, one folder per machine family. None has landed yet; the registry says so."""
