import json
import subprocess
import sys

from PIL import Image

from common.files import PROJECT_DIR
from data_utils import load_images

CODE = """
import json, sys, torch
network = torch.hub.load(sys.argv[1], "mnist_model_3", source="local")
pixels = network.preprocess("drawn.png")
row = network(network.normalize(pixels.float()))
fresh = torch.hub.load(sys.argv[1], "mnist_model_3", source="local", pretrained=False)
print(json.dumps([network.classes[row.argmax()], list(row.shape), network.training, fresh.training]))
"""


def test_torch_hub_loads_a_trained_network_from_anywhere(tmp_path, mnist):
    """In an interpreter of its own, some seconds, with nothing of the project on its path."""
    images, labels = load_images(mnist, train=False)
    Image.fromarray(255 - images[0].numpy()).resize((280, 280)).save(tmp_path / "drawn.png")
    line = [sys.executable, "-c", CODE, str(PROJECT_DIR)]
    done = subprocess.run(line, cwd=tmp_path, env={"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [str(labels[0].item()), [1, 10], False, True]
