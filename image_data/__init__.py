"""Images before they are batches.

fetch.py         MNIST's files, fetched and verified
policies.py      how far a training image may change, by name
augmentation.py  the change itself, on whole batches
form.py          a drawing or a photo in MNIST's form
"""
