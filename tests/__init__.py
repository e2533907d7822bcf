"""The tests: `tests.models` and other helpers are imported by this name.

Being a package, this folder cannot be hidden by a `tests` package that is installed elsewhere.
Its subfolders need no __init__ of their own.
"""
