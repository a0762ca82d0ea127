"""The three networks, each a table of its layers; what they are made of; and kernels that compute them faster."""
