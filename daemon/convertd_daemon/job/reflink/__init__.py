"""Conversions that share the blocks of their source: maps are written, and no data."""
