"""Maintenance of stores: verify, repair, gc, stats, show, copy, export.

Every tool takes a store's folder or URL, or a run file for all stores of the run (`places`). None needs
a model or torch; only `repair`, `gc` and `copy` write to stores.
"""
