"""The page: draw a digit, compare the runs, watch them train: ``python -m tools.web``.

app.py        the server, put together
server.py     what its routes stand on
predict.py    the networks' answers to a drawing
runs.py       the runs, compared and watched
digits.py     MNIST's test digits
live.py       what the runs are doing now
limits.py     how many may ask at once, and how much
guard.py      who may ask at all
measure.py    what the page is held to, measured
static/       the page itself
"""
