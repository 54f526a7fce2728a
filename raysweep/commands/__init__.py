"""The commands, by what they are about: sweeps, their results, models, the machine.

Each module has `add(commands, common)`, which gives its commands to the parser; a new command is a function beside it
and its lines there, and a new module a name in `cli.py`.
"""
