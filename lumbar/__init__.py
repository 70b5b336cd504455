"""The lumbar kit, in rooms. Imports go down only:

look -> run -> serve -> spine, grade -> data -> names, storage, limits, in_flight, weights.

`utils` is the front for notebooks.
"""
