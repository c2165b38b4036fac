"""Backbones: their names, weights, input sizes and precision."""
