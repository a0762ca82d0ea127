"""Commands that stand on a trained network or on the training itself: ``python -m tools.NAME``.

predict.py     which digits are on images
augment.py     what the network sees, and how fast it is made
evaluate/      what a careful engineer wants to know of a network
ensemble.py    several networks that vote
compare/       the runs beside each other
export/        small files for phones and browsers
benchmark/     speed of a step, accuracy over seeds
naive.py       the tutorial's loop that speed is measured against
tune/          better settings
web/           the page

What several of them stand on:

networks.py    any run or ensemble by its name
voting.py      how networks vote
trainings.py   trainings in processes of their own
timing.py      how fast a network is
intervals.py   how far a measured value may be from the true one
output.py      JSON and pictures
"""
