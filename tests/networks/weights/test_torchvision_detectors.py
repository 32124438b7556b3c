"""Weights of torchvision's own detectors in ours."""

import pytest
import torch
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.heads.detection import DetectorSpec
from lightning_attn.networks.images.network import Detector
from lightning_attn.networks.weights.torchvision_detectors import is_torchvision_detector, read_torchvision_detector

ARCHITECTURE = "fasterrcnn_resnet50_fpn"
COCO = get_model_weights(ARCHITECTURE)["COCO_V1"].meta["categories"]


class KeepsSizes(GeneralizedRCNNTransform):
    def resize(self, image, target):
        return image, target


def peer(num_labels, architecture=ARCHITECTURE):
    torch.manual_seed(3)
    model = get_model(architecture, weights=None, weights_backbone=None, num_classes=num_labels).eval()
    if architecture == ARCHITECTURE:
        torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    transform = model.transform
    model.transform = KeepsSizes(1, 1, transform.image_mean, transform.image_std)
    return model


def detector(num_classes, attention="none", **fields):
    spec = AttentionSpec(mechanism="none") if attention == "none" else AttentionSpec(terms=attention)
    backbone = build_backbone(ResNetSpec("resnet50", norm="frozen"), spec)
    return Detector(num_classes, backbone, DetectorSpec(**fields)).eval()


def older(state):
    """As torchvision wrote them before version 0.13, and as COCO_V1 is."""
    renamed = {}
    for name, value in state.items():
        if "fpn" in name or "rpn.head.conv" in name:
            name = name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
            name = name.replace("rpn.head.conv.0.", "rpn.head.conv.")
        renamed[name] = value
    assert renamed.keys() != state.keys()
    return renamed


@pytest.mark.parametrize("convert", [dict, older])
def test_a_file_with_the_datas_classes_gives_torchvisions_detections(convert, tmp_path):
    model, path = peer(4), tmp_path / "cells.pth"
    torch.save(convert(model.state_dict()), path)
    ours = detector(3)
    ours.load_state_dict(read_torchvision_detector(str(path), "faster_rcnn", ("a", "b", "c"), (7, 1, 300)))
    image = torch.randint(256, (3, 96, 128), dtype=torch.uint8)
    (found,), (expected,) = ours([image]), model([image / 255])
    assert len(expected["scores"]) > 20
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-4)
    assert torch.equal(found["labels"], expected["labels"])


def test_labels_of_coco_become_those_of_its_categories(tmp_path):
    ids = (1, 18, 90)
    model, path = peer(91), tmp_path / "coco.pth"
    torch.save(model.state_dict(), path)
    state = read_torchvision_detector(str(path), "faster_rcnn", [COCO[number] for number in ids], ids)
    scores, boxes = "roi_heads.box_predictor.cls_score.weight", "roi_heads.box_predictor.bbox_pred.weight"
    theirs = model.state_dict()
    for row, label in enumerate((0, *ids)):
        assert torch.equal(state[f"head.{scores}"][row], theirs[scores][label])
        assert torch.equal(state[f"head.{boxes}"][4 * row : 4 * row + 4], theirs[boxes][4 * label : 4 * label + 4])
    detector(3).load_state_dict(state)
    # Other categories under the same ids learn anew.
    state = read_torchvision_detector(str(path), "faster_rcnn", ["cell", "dog", "mug"], ids)
    assert not [name for name in state if "box_predictor" in name]
    assert any("box_head" in name for name in state)


def test_retinanet_has_labels_for_each_anchor(tmp_path):
    model, path = peer(91, "retinanet_resnet50_fpn"), tmp_path / "coco.pt"
    torch.save(model.state_dict(), path)
    state = read_torchvision_detector(str(path), "retinanet", [COCO[2], COCO[90]], (2, 90))
    name = "head.classification_head.cls_logits.weight"
    theirs = model.state_dict()[name]
    for anchor in range(9):
        for row, label in enumerate((2, 90)):
            assert torch.equal(state[f"head.retinanet.{name}"][2 * anchor + row], theirs[91 * anchor + label])


def test_what_torchvisions_weights_are_called():
    assert is_torchvision_detector("COCO_V1", "faster_rcnn")
    assert is_torchvision_detector("folder/mine.pth", "retinanet")
    assert not is_torchvision_detector("checkpoints/detection/bccd/best.ckpt", "faster_rcnn")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "resnet.pth"
    torch.save(get_model("resnet18").state_dict(), path)
    with pytest.raises(
        ValueError, match=r"resnet\.pth is not a state of torchvision's fasterrcnn_resnet50_fpn: it has no"
    ):
        read_torchvision_detector(str(path), "faster_rcnn", ("a",), (1,))
    state = peer(4).state_dict()
    del state["rpn.head.cls_logits.bias"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"(?s)is not a state of .*Missing key.*rpn\.head\.cls_logits\.bias"):
        read_torchvision_detector(str(path), "faster_rcnn", ("a",), (1,))
    with pytest.raises(FileNotFoundError, match=r"weights='nothing\.pth' is neither one of torchvision's"):
        read_torchvision_detector("nothing.pth", "faster_rcnn", ("a",), (1,))
