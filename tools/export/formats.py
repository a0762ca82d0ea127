"""The formats: how a network becomes a file of each, and how the file's own runtime runs it.

form = FORMATS["onnx"]
contents = form.build(Deployed(network).eval(), None)({"classes": "0 1 2 3 4 5 6 7 8 9"})
probabilities = form.load(contents)(images)     # uint8 [N, 1, 28, 28] -> float32 [N, 10]
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
from executorch.runtime import Runtime
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_static
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from imports import nn, torch
from tools.networks import Deployed

# ExecuTorch plans its memory when a file is made, for the most images that it will ever get at once.
MAX_BATCH = 100

Metadata = dict[str, str]
Maker = Callable[[Metadata], bytes]  # of a file with these words in it
Runner = Callable[[torch.Tensor], torch.Tensor]  # uint8 [N, 1, 28, 28] -> float32 [N, 10]


@dataclass(frozen=True)
class Format:
    """A kind of file and its runtime."""

    suffix: str  # of the file's name
    runtime: str  # the package that runs the file
    build: Callable[[Deployed, torch.Tensor | None], Maker]  # of calibration images, or of None for float32
    load: Callable[[bytes], Runner]  # what runs the file's bytes on one thread


def build_onnx(module: Deployed, calibration: torch.Tensor | None) -> Maker:
    """By torch's exporter; int8 by ONNX Runtime's static quantisation: weights per channel, activations per tensor."""
    exported = torch.onnx.export(
        module,
        (torch.zeros(2, 1, 28, 28, dtype=torch.uint8),),
        input_names=["image"],
        output_names=["probabilities"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        dynamo=True,
        verbose=False,
    )
    assert exported is not None
    proto = exported.model_proto
    if calibration is not None:
        batches = iter([{"image": part.numpy()} for part in calibration.split(MAX_BATCH)])
        with tempfile.TemporaryDirectory() as folder:
            prepared, quantized = Path(folder) / "prepared.onnx", Path(folder) / "quantized.onnx"
            quant_pre_process(proto, prepared)
            quantize_static(
                prepared,
                quantized,
                SimpleNamespace(get_next=lambda: next(batches, None)),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                # Weights in 7 of the 8 bits. Processors with AVX2 or AVX-512 but without VNNI add two products in 16
                # bits, which two of 8 bits overflow: a file then gives other probabilities there, and wrong ones.
                reduce_range=True,
            )
            proto = onnx.load(quantized)
    # The exporter notes beside every node from which line of which file it came: more bytes than the network has,
    # and the folders of whoever exported it.
    graph = proto.graph
    for noted in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del noted.metadata_props[:]
        noted.doc_string = ""
    del graph.value_info[:]

    def with_metadata(metadata: Metadata) -> bytes:
        onnx.helper.set_model_props(proto, metadata)
        onnx.checker.check_model(proto, full_check=True)
        contents: bytes = proto.SerializeToString()
        return contents

    return with_metadata


def load_onnx(contents: bytes) -> Runner:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"image": images.numpy()})[0])


def build_executorch(module: Deployed, calibration: torch.Tensor | None) -> Maker:
    """For XNNPACK; int8 by torchao's PT2E flow: weights per channel, activations per tensor."""
    program = _exported(module)
    if calibration is not None:
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        prepared = prepare_pt2e(program.module(), quantizer)
        with torch.inference_mode():
            for batch in calibration.split(MAX_BATCH):
                prepared(batch)
        program = _exported(convert_pt2e(prepared))

    def with_metadata(metadata: Metadata) -> bytes:
        # The format has no place for metadata: each entry is a method without inputs that returns it.
        lowered = to_edge_transform_and_lower(
            program, partitioner=[XnnpackPartitioner()], constant_methods=dict(metadata)
        )
        return bytes(lowered.to_executorch().buffer)

    return with_metadata


def _exported(module: nn.Module) -> torch.export.ExportedProgram:
    # The example must be the largest batch: lowering compares the sizes of the example with some limits, and where
    # a small one stays below such a limit it takes that as the most images that there can be.
    example = torch.zeros(MAX_BATCH, 1, 28, 28, dtype=torch.uint8)
    return torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("N", min=1, max=MAX_BATCH)},))


def load_executorch(contents: bytes) -> Runner:
    """ExecuTorch's Python runtime on one thread, in parts of at most ``MAX_BATCH`` images."""
    _unsafe_reset_threadpool(1)
    program = Runtime.get().load_program(contents)
    method = program.load_method("forward")

    def run(images: torch.Tensor, program: Any = program) -> torch.Tensor:  # the method needs the program alive
        return torch.cat([method.execute([part.contiguous()])[0] for part in images.split(MAX_BATCH)])

    return run


FORMATS = {
    "onnx": Format("onnx", "onnxruntime", build_onnx, load_onnx),
    "executorch": Format("pte", "executorch", build_executorch, load_executorch),
}
