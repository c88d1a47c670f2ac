"""Patches of other libraries."""
