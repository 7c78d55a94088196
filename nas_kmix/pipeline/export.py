"""A trained network as a program that runs without this repository's code, by torch.export or as ONNX.

In:  a network, how its images were prepared, and a few of them, uint8 (N, 3, S, S).
Out: one file. Its program takes uint8 squares (N, 3, S, S) for any N and normalises them itself, or, if `raw`, takes
     normalised float32 ones, and gives logits (N, classes). `about.json` in the .pt2 archive, and the metadata of the
     ONNX model, hold the fields of `Preparation`: class_names, image_size, resize, mean, std.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from darts_space import Preparation
from darts_space.preparation import Normalise
from nas_kmix.engine import files
from nas_kmix.engine.progress import Progress

TOLERANCE = 1e-5  # of the largest logit
ABOUT = "about.json"


def check_export(path: Path) -> None:
    """Refuse now what `export_network` would refuse after the training."""
    files.check_place("--export", path)
    if path.suffix not in WRITERS:
        raise ValueError(f"--export {path}: name a file that ends in .pt2 (torch.export) or .onnx.")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise ValueError(
            f"--export {path} needs {' and '.join(missing)}: pip install onnx onnxscript, or write "
            f"{path.with_suffix('.pt2')} (torch.export)."
        )


@torch.no_grad()
def export_network(model: nn.Module, preparation: Preparation, images: Tensor, path: Path, *, raw: bool) -> None:
    """Write `model` in eval mode to `path`, as a program for CPUs.

    Before it is written, the program is loaded again and must agree with the model on `images`, and on the first alone,
    to 1e-5 of the largest logit, or of 1 if that is smaller. Raises ValueError if it does not.
    """
    model = copy.deepcopy(model).cpu().eval()
    normalise = Normalise(preparation.mean, preparation.std)
    images = normalise(images.cpu()) if raw else images.cpu()
    whole = model if raw else nn.Sequential(normalise, model).eval()
    about = {**preparation.to_json(), "input": f"{'normalised float32' if raw else 'uint8'} RGB (N, 3, S, S)"}
    payload, run = WRITERS[path.suffix](whole, images, about)
    for batch in (images, images[:1]) if run is not None else ():
        expected = whole(batch)
        error = float((run(batch) - expected).abs().max() / expected.abs().max().clamp(min=1.0))
        if not error <= TOLERANCE:
            raise ValueError(f"--export {path}: the exported program differs from the network by {error:.1e}.")
    if run is None:
        Progress.say(f"warning: {path} was not compared with the network; pip install onnxruntime for that")
    files.write_bytes(path, payload)


Written = tuple[bytes, Callable[[Tensor], Tensor] | None]
"""The file, and the program in it as a function, if it can be run here."""


def _pt2(model: nn.Module, images: Tensor, about: dict[str, object]) -> Written:
    program = torch.export.export(model, (_two(images),), dynamic_shapes=ANY_BATCH)
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # harmless: no tensors share storage
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, buffer, extra_files={ABOUT: json.dumps(about)})
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _onnx(model: nn.Module, images: Tensor, about: dict[str, object]) -> Written:
    names = {"input_names": ["images"], "output_names": ["logits"]}
    program = torch.onnx.export(
        model, (_two(images),), dynamo=True, dynamic_shapes=ANY_BATCH, external_data=False, verbose=False, **names
    )
    proto = program.model_proto
    for name, value in about.items():
        proto.metadata_props.add(key=name, value=json.dumps(value))
    payload = proto.SerializeToString()
    try:
        import onnxruntime
    except ImportError:
        return payload, None
    session = onnxruntime.InferenceSession(payload, providers=["CPUExecutionProvider"])
    return payload, lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


WRITERS: dict[str, Callable[[nn.Module, Tensor, dict[str, object]], Written]] = {".pt2": _pt2, ".onnx": _onnx}
ANY_BATCH = ({0: torch.export.Dim("batch", min=1)},)


def _two(images: Tensor) -> Tensor:
    """An example batch: of one image, export would take the size for fixed."""
    return images[:1].expand(2, -1, -1, -1)
