"""The page: draw a digit, compare the runs, watch them train: ``python -m tools.web``.

app.py       the server, put together
server.py    what its routes stand on
routes.py    what the views Draw, Compare and Live ask
live.py      what the runs are doing now
guard.py     who may ask at all
static/      the page itself
"""
