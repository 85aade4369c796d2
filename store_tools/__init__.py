"""Looking after stores: verify, repair, gc, stats, show, copy, export.

Every tool takes a store's folder or URL, or a run file, which stands for all stores of the run
(`places`). None needs a model or torch; none writes to a store but `repair`, `gc` and `copy`.
"""
