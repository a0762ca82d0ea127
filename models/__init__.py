"""The three networks and what they are made of.

model_v1.py model_v2.py model_v3.py   a network each, as a table of its layers
blocks.py           what they share: the convolution block, the stem
dropout.py          dropout that draws positions
kernels.py          a whole network as one operation on the CPU, in kernels.cpp
receptive_field.py  what a layer sees of the image
"""
