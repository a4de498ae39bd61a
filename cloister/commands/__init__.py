"""The commands, one file each.

A module here defines ``app``, a ``typer.Typer(add_completion=False)`` with one command, or with several for a group. It
is imported only when its command is called, and listed with its one line of help in ``cloister.main``. A command prints
results through ``cloister.output`` and raises the errors of ``wire.errors``; ``cloister.exits`` turns them into exit
codes.
"""
