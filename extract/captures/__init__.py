"""Captures of other programs as source stores."""
