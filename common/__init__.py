"""What everything stands on.

files.py     a run's paths, safe writing, the errors that a command tells in one line
results.py   weights and metrics on disk, verified when they are read
cli.py       what every command does alike: mistakes in one line, exit status, signals
"""
