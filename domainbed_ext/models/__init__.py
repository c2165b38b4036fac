"""Backbones: by which names, from which weights, at which input size and in which precision."""
