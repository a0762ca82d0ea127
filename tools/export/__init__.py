"""A trained network as one small file for a phone or a browser: ``python -m tools.export``.

files.py      the files: made, held against the network, measured, written
formats.py    ONNX and ExecuTorch, and the runtimes that run them
measures.py   accuracy and latency
report.py     the table and the picture
"""
