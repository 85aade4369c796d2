"""Shared code and style of the HTML pages."""
