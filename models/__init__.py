"""The three networks and what they are made of.

model_v1.py model_v2.py model_v3.py   a network each, as a table of its layers
blocks.py           what they share: the convolution block, the stem
fused.py            a block's ReLU, BatchNorm and dropout as one operation
kernels.py          the blocks as CPU kernels, in kernels.cpp
receptive_field.py  what a layer sees of the image
"""
