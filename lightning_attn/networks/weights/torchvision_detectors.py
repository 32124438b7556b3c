"""Converts weights of torchvision's detectors to the names and categories of ours."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models import get_model, get_model_weights

from lightning_attn.errors import InputError
from lightning_attn.networks.weights.torchvision import COUNTER, read_weights, weight_names

_ARCHITECTURES: dict[str, str] = {"faster_rcnn": "fasterrcnn_resnet50_fpn", "retinanet": "retinanet_resnet50_fpn"}
_PREDICTORS: dict[str, tuple[str, ...]] = {
    "faster_rcnn": ("roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"),
    "retinanet": ("head.classification_head.cls_logits",),
}
_FILES = (".pth", ".pt")


def is_torchvision_detector(weights: str, head: str) -> bool:
    """Whether this is a name of torchvision's weights for a head, such as "COCO_V1", or a file in its format."""
    return head in _ARCHITECTURES and (weights in weight_names(_ARCHITECTURES[head]) or weights.endswith(_FILES))


def read_torchvision_detector(weights: str, head: str, names: Sequence[str], ids: Sequence[int]) -> dict[str, Tensor]:
    """Reads a `fasterrcnn_resnet50_fpn` or `retinanet_resnet50_fpn`, and converts its labels to those of the data.

    A file with as many classes as the data is used unchanged. torchvision's files have a label for each of COCO's ids,
    1 to 90: those of the data's categories are selected if COCO has them under the same names and ids; otherwise the
    class-specific layers are omitted.

    Args:
        weights: A name of torchvision's, or the path of a file written by `torch.save(model.state_dict(), path)`.
        head: Which of the two.
        names: Of the data's categories, in the order of the network's labels.
        ids: Their ids.

    Returns:
        Tensors by the names of `Detector`, on the CPU.

    Raises:
        OSError: If the file cannot be read or downloaded.
        ValueError: If it contains something else.
    """
    architecture = _ARCHITECTURES[head]
    state = read_weights(weights, architecture)
    predictor = f"{_PREDICTORS[head][0]}.weight"
    anchors = 9 if head == "retinanet" else 1
    if predictor not in state or len(state[predictor]) % anchors:
        raise InputError(
            f"initial_weights: {weights} is not a state of torchvision's {architecture}: it has no {predictor} for its "
            f"{anchors} anchors. Write the file by torch.save(model.state_dict(), path)."
        )
    outputs = len(state[predictor]) // anchors
    # torchvision's model converts the names of its older files.
    with torch.device("meta"):
        model = get_model(architecture, weights=None, weights_backbone=None, num_classes=outputs)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise InputError(
            f"initial_weights: {weights} is not a state of torchvision's {architecture}: {error}"
        ) from error
    state = {name: value for name, value in model.state_dict().items() if not name.endswith(COUNTER)}
    background = 1 if head == "faster_rcnn" else 0
    if outputs == len(ids) + background:
        return _renamed(state, head)
    if _are_coco_categories(architecture, outputs, names, ids):
        selected = torch.tensor([*range(background), *ids])
        selected_rows = {
            f"{layer}.{part}": _select_labels(state[f"{layer}.{part}"], outputs, selected)
            for layer in _PREDICTORS[head]
            for part in ("weight", "bias")
        }
        return _renamed(state | selected_rows, head)
    return _renamed({name: value for name, value in state.items() if not name.startswith(_PREDICTORS[head])}, head)


def _renamed(state: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """Renames torchvision's entries to those of `Detector`: all but those of the backbone's body belong to the head."""
    prefix = "head.retinanet." if head == "retinanet" else "head."
    return {
        name
        if name.startswith("backbone.body.")
        else f"head.{name.removeprefix('backbone.')}"
        if name.startswith("backbone.fpn.")
        else f"{prefix}{name}": value
        for name, value in state.items()
    }


def _are_coco_categories(architecture: str, outputs: int, names: Sequence[str], ids: Sequence[int]) -> bool:
    """Whether COCO has the data's categories under the same ids."""
    categories = get_model_weights(architecture)["COCO_V1"].meta["categories"]
    if outputs != len(categories):
        return False
    return all(0 < number < outputs and categories[number] == name for name, number in zip(names, ids, strict=True))


def _select_labels(value: Tensor, outputs: int, selected: Tensor) -> Tensor:
    """The rows of some labels: classification has them innermost (for each anchor), regression outermost (of 4)."""
    if len(value) == 4 * outputs:
        return torch.unflatten(value, 0, (outputs, 4))[selected].flatten(0, 1)
    return torch.unflatten(value, 0, (-1, outputs))[:, selected].flatten(0, 1)
