import json
import subprocess
import sys

from PIL import Image

from data_utils import load_images

CODE = """
import json, sys, torch
network = torch.hub.load(sys.argv[1], "mnist_model_3", source="local")
pixels = network.preprocess("drawn.png")
row = network(network.normalize(pixels.float()))
fresh = torch.hub.load(sys.argv[1], "mnist_model_3", source="local", pretrained=False)
print(sys.modules["visualization"].__file__)
print(json.dumps([network.classes[row.argmax()], list(row.shape), network.training, fresh.training]))
"""


def test_torch_hub_loads_a_trained_network_from_anywhere(tmp_path, shipped_project, mnist):
    """Of a copy in another folder, in an interpreter of its own, some seconds, with nothing else on its path."""
    images, labels = load_images(mnist, train=False)
    Image.fromarray(255 - images[0].numpy()).resize((280, 280)).save(tmp_path / "drawn.png")
    line = [sys.executable, "-c", CODE, str(shipped_project)]
    done = subprocess.run(line, cwd=tmp_path, env={"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from_there, told = done.stdout.splitlines()
    assert from_there == str(shipped_project / "visualization.py")
    assert json.loads(told) == [str(labels[0].item()), [1, 10], False, True]
