"""The lumbar kit, in rooms. Imports go down only:

look -> run -> serve -> spine, grade -> data -> names, storage, limits, problems, in_flight, weights.
spine also uses the phantom, and that data.

`utils` is the front for notebooks and scripts.
"""
