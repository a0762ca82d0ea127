"""A network as ONNX Runtime computes it."""

import io
import warnings

import onnxruntime

from imports import nn, torch


def onnx_session(module: nn.Module) -> onnxruntime.InferenceSession:
    """A module as ONNX Runtime computes it, on one thread: several times as fast for an image as PyTorch.

    By PyTorch's older exporter, which takes 20 ms; the newer one takes a second.
    """
    contents, example = io.BytesIO(), torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of its age
        torch.onnx.export(
            module.eval(),
            (example,),
            contents,  # type: ignore[arg-type]  # a file in memory too
            input_names=["image"],
            dynamic_axes={"image": {0: "N"}},
            dynamo=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(contents.getvalue(), options, providers=["CPUExecutionProvider"])
