"""A trained network as one small file for a phone or a browser: ``python -m tools.export``.

files.py     the files: made, held against the network, measured, written
html.py      one file that needs nothing but a browser
formats.py   ONNX and ExecuTorch, and the runtimes that run them
"""
