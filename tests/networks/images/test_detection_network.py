"""The detectors: equal to torchvision's where they are the same, and right where torchvision's are not."""

import copy
import re

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.batching import IMAGENET_MEAN, IMAGENET_STD
from lightning_attn.networks.images.heads.detection import DetectorSpec
from lightning_attn.networks.images.network import Detector

NONE = AttentionSpec(mechanism="none")
LOSSES = {
    "faster_rcnn": {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"},
    "retinanet": {"classification", "bbox_regression"},
}
SMALL = {"fpn_channels": 16, "anchor_sizes": (8.0, 16.0, 32.0, 64.0, 128.0)}
heads = pytest.mark.parametrize("head", LOSSES)
OUR_NAMES = {
    "faster_rcnn": lambda name: re.sub(r"^(backbone\.(?=fpn)|(?=rpn|roi_heads))", "head.", name),
    "retinanet": lambda name: re.sub(r"^backbone\.(?=fpn)", "head.", re.sub(r"^head", "head.retinanet.head", name)),
}


def small_detector(head="faster_rcnn", attention=NONE, num_classes=3, detector=None, **backbone):
    second_stage = {"fc_dim": 32} if head == "faster_rcnn" else {}
    return Detector(
        num_classes,
        build_backbone(ResNetSpec(**{"name": "bottleneck14", "width": 16} | backbone), attention),
        DetectorSpec(**SMALL | second_stage | {"head": head} | (detector or {})),
    )


def picture(height, width):
    return torch.randint(256, (3, height, width), dtype=torch.uint8)


def batch():
    images = [picture(64, 96), picture(50, 80), picture(33, 41)]
    targets = [
        {"boxes": torch.tensor([[4.0, 6, 30, 40], [50, 10, 90, 60]]), "labels": torch.tensor([1, 3])},
        {"boxes": torch.tensor([[10.0, 10, 28, 26]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return images, targets


class KeepsSizes(GeneralizedRCNNTransform):
    """torchvision's own normalisation and padding, in our layout: its rounding decides between boxes of equal rank."""

    def __init__(self):
        super().__init__(1, 1, IMAGENET_MEAN, IMAGENET_STD)

    def resize(self, image, target):
        return image, target

    def batch_images(self, images, size_divisible=32):
        return super().batch_images(images, size_divisible).contiguous(memory_format=torch.channels_last)


def torchvision_peer(head, num_classes):
    """torchvision's detector with all of its own parts, but for the resizing of images."""
    resnet = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    for module in resnet.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.bias.normal_(std=0.1)
            module.weight.uniform_(0.3, 0.6)
    sizes = SMALL["anchor_sizes"]
    stages = (1, 2, 3, 4) if head == "faster_rcnn" else (2, 3, 4)
    backbone = BackboneWithFPN(
        resnet,
        {f"layer{stage}": str(index) for index, stage in enumerate(stages)},
        [32 * 2**stage for stage in stages],
        32,
        extra_blocks=LastLevelMaxPool() if head == "faster_rcnn" else LastLevelP6P7(512, 32),
    )
    if head == "faster_rcnn":
        peer = FasterRCNN(
            backbone,
            num_classes + 1,
            rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in sizes), ((0.5, 1.0, 2.0),) * 5),
        )
    else:
        octaves = tuple(tuple(size * 2 ** (i / 3) for i in range(3)) for size in sizes)
        peer = RetinaNet(
            backbone,
            num_classes,
            anchor_generator=AnchorGenerator(octaves, ((0.5, 1.0, 2.0),) * 5),
            detections_per_img=100,
        )
    peer.transform = KeepsSizes()
    return peer


@heads
def test_is_torchvisions_detector(head):
    peer = torchvision_peer(head, num_classes=3)
    detector = Detector(
        3,
        build_backbone(ResNetSpec("resnet18", norm="frozen", trainable_layers=3), NONE),
        DetectorSpec(**SMALL | {"head": head, "fpn_channels": 32}),
    )
    if head == "retinanet":  # or nothing scores above the threshold before training
        nn.init.constant_(peer.head.classification_head.cls_logits.bias, -2.0)
    detector.load_state_dict({OUR_NAMES[head](name): value for name, value in peer.state_dict().items()})
    images, targets = batch()
    peer.eval(), detector.eval()
    with torch.no_grad():
        expected, found = peer([image / 255 for image in images]), detector(images)
    label_shift = 1 if head == "retinanet" else 0
    for theirs, ours, image in zip(expected, found, images, strict=True):
        assert len(ours["boxes"]) == 100
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-5, atol=1e-5)
        assert torch.equal(ours["labels"], theirs["labels"] + label_shift)
        assert set(ours["labels"].tolist()) <= {1, 2, 3}
        assert ours["boxes"].min() >= 0
        assert (ours["boxes"].amax(0)[2:] <= torch.tensor([image.shape[2], image.shape[1]])).all()

    peer.train(), detector.train()
    peers_targets = [target | {"labels": target["labels"] - label_shift} for target in targets]
    torch.manual_seed(7)
    expected = peer([image / 255 for image in images], peers_targets)
    torch.manual_seed(7)
    found = detector(images, targets)
    assert set(found) == LOSSES[head]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


MECHANISMS = {
    "1111": AttentionSpec(terms="1111"),
    "0010 deformable": AttentionSpec(terms="0010", convolution="deformable"),
    "0011 modulated": AttentionSpec(terms="0011", kv_stride=2, convolution="modulated_deformable"),
    "dynamic": AttentionSpec(mechanism="dynamic"),
    "none": NONE,
}


@heads
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_trained_parameter_gets_a_gradient(head, mechanism):
    """What distributed training needs, also where an image, or all images, have no boxes."""
    detector = small_detector(head, MECHANISMS[mechanism], trainable_layers=3)
    images, targets = batch()
    for chosen in (slice(0, 3), slice(2, 3)):
        detector.zero_grad()
        losses = detector(images[chosen], targets[chosen])
        assert set(losses) == LOSSES[head]
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        for name, parameter in detector.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            assert parameter.grad is None or parameter.grad.isfinite().all(), name


@heads
def test_a_small_step_against_the_gradient_lowers_the_loss_by_its_square(head):
    torch.manual_seed(0)
    few = {"roi_batch_size": 16, "rpn_batch_size": 32, "rpn_post_nms_top_n_train": 50} if head == "faster_rcnn" else {}
    detector = small_detector(head, AttentionSpec(terms="0010"), detector=few, norm="group")
    image = torch.full((3, 64, 64), 90, dtype=torch.uint8)
    image[0, 10:40, 20:50] = 255
    target = {"boxes": torch.tensor([[20.0, 10, 50, 40]]), "labels": torch.tensor([3])}
    # Proposals move with what makes them, and the loss does not look through them: there only the head on them counts.
    part = detector.head.roi_heads if head == "faster_rcnn" else detector
    parameters = [parameter for parameter in part.parameters() if parameter.requires_grad]

    def loss():
        torch.manual_seed(1)  # draws the same anchors and proposals
        return sum(detector([image], [target]).values())

    before = loss()
    gradients = torch.autograd.grad(before, parameters)
    square = sum(gradient.square().sum() for gradient in gradients)
    step = 1e-3 * before.detach() / square
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= step * gradient
        fall = before - loss()
    assert fall.item() == pytest.approx((step * square).item(), rel=0.1)


@heads
def test_nothing_is_found_above_a_score_of_one(head):
    detector = small_detector(head, detector={"score_threshold": 1.0}).eval()
    with torch.inference_mode():
        for found in detector(batch()[0]):
            assert found["boxes"].shape == (0, 4)
            assert found["scores"].shape == found["labels"].shape == (0,)
            assert found["labels"].dtype == torch.int64


def no_proposals(detector):
    """Moves all proposals far out of the image."""
    nn.init.constant_(detector.head.rpn.head.bbox_pred.bias, 4.0)
    nn.init.constant_(detector.head.rpn.head.bbox_pred.weight, 0.0)
    with torch.no_grad():
        detector.head.rpn.head.bbox_pred.bias.view(-1, 4)[:, :2] = 1e4
    return detector


def test_no_proposals_at_all():
    detector = no_proposals(small_detector())
    images, targets = batch()
    losses = detector(images[2:], targets[2:])
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert detector.eval()(images[2:])[0]["boxes"].shape == (0, 4)


@heads
@pytest.mark.parametrize("size", [(1, 1), (1, 70)])
def test_tiny_images(head, size):
    detector = small_detector(head)
    height, width = size
    target = {"boxes": torch.tensor([[0.0, 0, width, height]]), "labels": torch.tensor([1])}
    assert all(loss.isfinite() for loss in detector([picture(*size)], [target]).values())
    (found,) = detector.eval()([picture(*size)])
    assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()


def test_an_image_mostly_of_padding_does_not_change_what_follows():
    """torchvision infers the strides of RoIAlign from the first batch, and keeps them."""
    detector = small_detector().eval()
    images = batch()[0]
    fresh = copy.deepcopy(detector)(images)
    detector([picture(1, 1)])
    for found, expected in zip(detector(images), fresh, strict=True):
        assert torch.equal(found["boxes"], expected["boxes"])


@heads
def test_autocast_computes_boxes_in_float32(head):
    """Boxes of a wide image: bfloat16 has steps of 4 pixels there."""
    detector = small_detector(
        head, AttentionSpec(terms="0010"), norm="frozen", detector={"score_threshold": 0.0}
    ).eval()
    seen = {}
    owner = detector.head.rpn if head == "faster_rcnn" else detector.head.retinanet
    owner.head.register_forward_hook(lambda module, args, output: seen.update(args=args[0], output=output))
    generator = (
        detector.head.rpn.anchor_generator if head == "faster_rcnn" else detector.head.retinanet.anchor_generator
    )
    generator.register_forward_hook(lambda module, args, output: seen.update(anchors=output))
    images, targets = [picture(40, 1001)], [{"boxes": torch.tensor([[3.0, 2, 900, 30]]), "labels": torch.tensor([2])}]
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = detector(images)
        losses = detector.train()(images, targets)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    assert seen["args"][0].dtype == seen["anchors"][0].dtype == torch.float32
    assert len(seen["anchors"][0][:, :2].unique(dim=0)) > 600  # in bfloat16 neighbours would fall together
    outputs = seen["output"].values() if head == "retinanet" else [*seen["output"][0], *seen["output"][1]]
    assert {output.dtype for output in outputs} == {torch.float32}
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    exact = detector(images, targets)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.05)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_boxes_vote(precision):
    torch.manual_seed(1)
    plain, everything, voting = (
        small_detector(detector=settings).head.roi_heads
        for settings in (
            {"nms_threshold": 0.4},
            {"nms_threshold": 1.0, "detections_per_img": 10_000},
            {"nms_threshold": 0.4, "box_voting": 0.6},
        )
    )
    corners = torch.rand(200, 2) * 60
    proposals = [torch.cat([corners, corners + 15 + 15 * torch.rand(200, 2)], dim=1), torch.zeros(0, 4)]
    arguments = (3 * torch.randn(200, 4), torch.randn(200, 16), proposals, [(80, 90), (50, 50)])
    (kept, _), (scores, _), (labels, _) = plain.postprocess_detections(*arguments)
    (voters, _), (weights, _), (voter_labels, _) = everything.postprocess_detections(*arguments)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        (voted, none), (voted_scores, _), (voted_labels, _) = voting.postprocess_detections(*arguments)
    assert none.shape == (0, 4)
    assert torch.equal(voted_scores, scores)
    assert torch.equal(voted_labels, labels)
    changed = 0
    for box, label, found in zip(kept, labels, voted, strict=True):
        total, weight = torch.zeros(4), 0.0
        for voter, score, voter_label in zip(voters, weights, voter_labels, strict=True):
            low, high = torch.maximum(box[:2], voter[:2]), torch.minimum(box[2:], voter[2:])
            common = (high - low).clamp(min=0).prod()
            union = (box[2:] - box[:2]).prod() + (voter[2:] - voter[:2]).prod() - common
            if voter_label == label and common / union >= 0.6:
                total, weight = total + score * voter, weight + score
        assert torch.allclose(found, total / weight, atol=1e-3)
        changed += int((found - box).abs().max() > 0.5)
    assert changed > 20


def test_frozen_parts_stay_as_they_are():
    detector = small_detector(norm="frozen", trainable_layers=2)
    before = copy.deepcopy(detector.state_dict())
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    sum(detector(*batch()).values()).backward()
    optimizer.step()
    for name, value in detector.state_dict().items():
        frozen = "body" in name and (
            any(part in name for part in ("bn", "downsample.1", "layer1", "layer2")) or "body.conv1" in name
        )
        moved = not torch.equal(value, before[name])
        assert moved != frozen or name.endswith("bias"), name  # a bias of zero may have no gradient
        assert not (frozen and moved), name


def bad_targets():
    good = batch()[1]
    for change, message in [
        ({"labels": torch.tensor([4])}, r"targets\[1\]\['labels'\]\[0\] is 4, but the detector has the labels 1 to 3"),
        ({"labels": torch.tensor([0])}, r"targets\[1\]\['labels'\]\[0\] is 0.*Map categories to 1..K"),
        ({"labels": torch.tensor([1.0])}, r"targets\[1\]\['labels'\] must be int64 \[1\].*torch.float32"),
        ({"labels": torch.tensor([1, 1])}, r"targets\[1\]\['labels'\] must be int64 \[1\].*\(2,\)"),
        ({"boxes": torch.tensor([[10.0, 10, 10, 26]])}, r"targets\[1\]\['boxes'\]\[0\] is \[10.0, 10.0, 10.0, 26.0\]"),
        ({"boxes": torch.tensor([[10.0, float("nan"), 20, 26]])}, r"targets\[1\]\['boxes'\]\[0\].*must be finite"),
        (
            {"boxes": torch.tensor([[10, 10, 20, 26]])},
            r"targets\[1\]\['boxes'\] must be float32 \[n, 4\], got torch.int",
        ),
        ({"boxes": torch.tensor([10.0, 10, 20, 26])}, r"targets\[1\]\['boxes'\] must be float32 \[n, 4\].*\(4,\)"),
    ]:
        yield [good[0], good[1] | change, good[2]], message
    yield good[:2], "targets has 2 entries for 3 images"
    yield None, r"targets is required in training mode; call eval\(\) for results"


@pytest.mark.parametrize(("targets", "message"), [*bad_targets()])
def test_refuses_targets(targets, message):
    with pytest.raises(ValueError, match=message):
        small_detector()(batch()[0], targets)


def test_refuses_targets_in_evaluation():
    with pytest.raises(ValueError, match="targets was given in evaluation mode"):
        small_detector().eval()(*batch())


def test_refuses_no_classes():
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
        small_detector(num_classes=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head": "ssd"}, "head must be one of .*'retinanet'.*got 'ssd'"),
        ({"fpn_channels": 0}, "fpn_channels must be an integer of at least 1, got 0"),
        ({"rpn_post_nms_top_n_train": 0.5}, "rpn_post_nms_top_n_train must be an integer of at least 1, got 0.5"),
        ({"box_voting": 2.0}, "box_voting must be a number from 0 to 1, got 2.0"),
        (
            {"head": "retinanet", "box_voting": 0.8},
            r"box_voting=0\.8: not used by head='retinanet'. Leave out",
        ),
        ({"head": "retinanet", "roi_size": 14}, "roi_size=14: not used by head='retinanet'"),
        ({"topk_candidates": 500}, "topk_candidates=500: not used by head='faster_rcnn'.*head: retinanet"),
        ({"nms_threshold": 1.5}, "nms_threshold must be a number from 0 to 1, got 1.5"),
        ({"score_threshold": float("nan")}, "score_threshold must be a number from 0 to 1, got nan"),
        ({"anchor_sizes": (32.0, 64.0)}, r"anchor_sizes must have one size for each of the 5 levels.*got 2: \[32.0"),
        ({"anchor_sizes": (32.0, 64.0, 128.0, 256.0, -1.0)}, "anchor_sizes must be a list of positive numbers"),
        ({"aspect_ratios": ()}, r"aspect_ratios must be a list of positive numbers, got \(\)"),
        ({"rpn_background_iou": 0.8}, "rpn_background_iou=0.8 must not be above rpn_foreground_iou=0.7"),
    ],
)
def test_spec_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        DetectorSpec(**fields)


def test_the_papers_settings_are_the_defaults():
    detector = Detector(80, build_backbone(ResNetSpec("bottleneck14", width=16), NONE), DetectorSpec())
    rpn, roi_heads = detector.head.rpn, detector.head.roi_heads
    assert rpn.anchor_generator.num_anchors_per_location() == [3] * 5
    assert rpn.anchor_generator.sizes == [(32.0,), (64.0,), (128.0,), (256.0,), (512.0,)]
    assert (rpn.train().post_nms_top_n(), rpn.eval().post_nms_top_n()) == (2000, 1000)
    assert rpn.nms_thresh == 0.7
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert (roi_heads.fg_bg_sampler.batch_size_per_image, roi_heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (roi_heads.score_thresh, roi_heads.nms_thresh, roi_heads.detections_per_img) == (0.05, 0.5, 100)
    assert roi_heads.box_head.fc7.weight.shape == (1024, 1024)
    assert roi_heads.box_predictor.cls_score.out_features == 81
