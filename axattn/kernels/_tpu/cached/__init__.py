"""Attention over caches: decode, latent decode, and prompts."""
