"""Comparison with the papers' tables and claims."""
