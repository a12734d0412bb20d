"""Writing and running graphs: ONNX, torch.export and OpenVINO, each in a few lines."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitzoo.engine.traced import Network, trace
from vitzoo.errors import InputError

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml"}
# Name of every graph's input, where the format has names.
INPUT = "image"
QUANTIZED = {
    "onnx": "onnxruntime.quantization.quantize_dynamic",
    "torch-export": "torchao Int8DynamicActivationInt8WeightConfig",
    "openvino": "onnxruntime.quantization.quantize_dynamic, converted",
}
Runner = Callable[[Tensor], Sequence[Tensor]]


def write_graph(
    program: torch.export.ExportedProgram,
    network: Network,
    to: str,
    path: Path,
    *,
    int8: bool,
    dynamic: Sequence[str],
) -> None:
    """Write the traced network in a format; with `int8` quantised on the way."""
    if to == "torch-export":
        if int8:
            program = _torchao(network, dynamic)
        torch.export.save(program, path)
        return
    if to == "onnx":
        _write_onnx(program, path, network.outputs, int8=int8)
        return
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        _write_onnx(program, onnx, network.outputs, int8=int8)
        model = openvino.convert_model(onnx)
        if int8:
            _store_as_int8(model)
        openvino.save_model(model, path, compress_to_fp16=False)


def _store_as_int8(model: Any) -> None:
    """Hold quantised weights in bytes: the conversion from ONNX widens them to int32."""
    import openvino
    from openvino import opset13

    for node in model.get_ops():
        wide = node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.i32
        if not wide or len(node.get_output_shape(0)) < 2 or abs(node.data).max() > 127:
            continue
        narrow = opset13.convert(opset13.constant(node.data.astype("int8")), "i32")
        node.output(0).replace(narrow.output(0))


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str], *, int8: bool
) -> None:
    from onnxscript import optimizer

    made = torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=list(outputs),
        dynamo=True,
        external_data=False,
        optimize=False,
        verbose=False,
    )
    if made is None:
        raise RuntimeError("torch.onnx.export made no program")
    # All but onnxscript's search for patterns, which takes minutes where sides are symbols;
    # runtimes fuse on their own.
    optimizer.inline(made.model)
    optimizer.fold_constants(made.model)
    optimizer.remove_unused_nodes(made.model)
    if not int8:
        made.save(path, external_data=False)
        return
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        wide = Path(folder) / "wide.onnx"
        made.save(wide, external_data=False)
        # Its integer convolution is slower than the float one, and most work is in the products.
        quantize_dynamic(
            wide, path, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8
        )


def _torchao(network: Network, dynamic: Sequence[str]) -> torch.export.ExportedProgram:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.utils import unwrap_tensor_subclass

    quantized = copy.deepcopy(network.model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    try:
        return trace(unwrap_tensor_subclass(quantized), network.shape, dynamic)
    except RuntimeError as error:
        # Its weights only know products, and some layers join or scale theirs first.
        reason = str(error).splitlines()[0]
        raise InputError(
            f"torchao cannot quantise this model ({reason}); --to onnx --int8 can"
        ) from error


def write_detector(network: Network, path: Path) -> None:
    """Write a detector of one image of one size to ONNX by torch's older exporter.

    The newer one goes through torch.export, which does not trace what depends on values: how many
    boxes are left. The older one takes the sides of padded windows for constants.
    """
    image = torch.rand(network.shape)
    with torch.no_grad(), warnings.catch_warnings():
        # It warns of every size that becomes a constant.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.model,
            (image,),
            path,
            dynamo=False,
            opset_version=17,
            input_names=[INPUT],
            output_names=list(network.outputs),
        )


def files_of(path: Path, to: str) -> list[Path]:
    """The files that make up a graph: OpenVINO's weights lie beside it."""
    return [path, path.with_suffix(".bin")] if to == "openvino" else [path]


def run_graph(path: Path, to: str) -> Runner:
    """A function from images to the graph's outputs, on the CPU in the graph's own precision."""
    if to == "torch-export":
        # The guards of a trace speak of memory layout, which the graph's own copies settle.
        module = torch.export.load(path).module(check_guards=False)

        def run_torch(x: Tensor) -> Sequence[Tensor]:
            with torch.no_grad():
                out: Any = module(x)
            return [out] if isinstance(out, Tensor) else list(out)

        return run_torch
    if to == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Threads that wait busily would slow down whatever runs between two calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda x: [torch.from_numpy(out) for out in session.run(None, {name: x.numpy()})]
    import openvino

    # OpenVINO takes bfloat16 where the processor has it, unless told; that is 1e-2 off.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    return lambda x: [torch.from_numpy(out.copy()) for out in compiled(x.numpy()).values()]
