"""Images before they are batches.

fetch.py         MNIST's files, fetched and verified
facts.py         any data set in MNIST's form, and what a run knows of it
readers.py       data sets of one's own: folders, CSV, IDX; torchvision's
policies.py      how far a training image may change, by name
augmentation.py  the change itself, on whole batches
form.py          a drawing or a photo in MNIST's form
"""
