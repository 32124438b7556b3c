"""The peer of detection is torchvision's, of our sizes, and is trained as its configuration says."""

import dataclasses

import pytest
import torch
from coco_data import CATEGORIES, write_coco
from detection_problems import SMALL
from torchvision.models import resnet18, resnet50

from benchmarks.case import Run
from benchmarks.detection import BENCHMARK
from benchmarks.peers.torchvision_detector import torchvision_detector, torchvision_resnet, train_mode
from benchmarks.peers.torchvision_training import CASE, Peer, Training, read_configuration
from benchmarks.report import read_report
from benchmarks.results import Result
from benchmarks.runner import main
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.network import Detector
from lightning_attn.tasks import ScheduleSpec


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(
        """
seed_everything: 3
model:
  class_path: DetectionTask
  init_args:
    attention: {terms: "0010", num_heads: 2, convolution: deformable}
    backbone: {name: bottleneck14, width: 8, norm: batch}
    detector:
      fpn_channels: 8
      anchor_sizes: [8, 12, 16, 24, 32]
      aspect_ratios: [1.0]
      roi_canonical_size: 32
      fc_dim: 16
      rpn_post_nms_top_n_train: 50
      rpn_post_nms_top_n_test: 50
      roi_batch_size: 16
      score_threshold: 0.0
    optimizer: {name: sgd, learning_rate: 0.02, weight_decay: 1.0e-4, base_batch_size: 8}
    schedule: {name: cosine, warmup_steps: 1, warmup_start: 0.5}
data:
  class_path: COCODataModule
  init_args: {root: nowhere, batch_size: 2, min_size: 48, max_size: 80}
trainer:
  accelerator: cpu
  max_steps: 3
  gradient_clip_val: 10.0
""",
        encoding="utf-8",
    )
    return path


def configured(config, data, **options):
    training = Training(config=(str(config),), root=str(data), **options)
    return dataclasses.replace(CASE, problem=CASE.complete(training))


@pytest.mark.parametrize(("name", "build"), [("resnet18", resnet18), ("resnet50", resnet50)])
def test_the_peers_backbone_is_torchvisions(name, build, tmp_path):
    torch.manual_seed(0)
    original = build().eval()
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    body = torchvision_resnet(ResNetSpec(name, weights=str(tmp_path / "weights.pt"))).eval()
    x = torch.randn(1, 3, 40, 64)
    expected = x
    for child in list(original.children())[:-2]:  # without the classifier
        expected = child(expected)
    torch.testing.assert_close(body(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("norm", "trained"), [("batch", 5), ("frozen", 3), ("group", 2)])
def test_the_peer_has_the_shape_of_ours(norm, trained):
    backbone = ResNetSpec("bottleneck26", width=8, norm=norm, trainable_layers=trained)
    peer = torchvision_detector(3, backbone, SMALL.detector)
    ours = Detector(3, build_backbone(backbone, SMALL.attention("none")), SMALL.detector)

    def shapes(network, only_trained):
        parameters = network.parameters()
        return sorted(tuple(p.shape) for p in parameters if p.requires_grad or not only_trained)

    assert shapes(peer, False) == shapes(ours, False)
    assert shapes(peer, True) == shapes(ours, True)
    for ending in ("rpn", "roi_heads"):
        settings = [
            {name: value for name, value in vars(part.get_submodule(ending)).items() if not name.startswith("_")}
            for part in (peer, ours.head)
        ]
        for values in settings:
            values.pop("box_similarity", None)
            assert values.pop("box_voting", 0) == 0, "the peer has none"
            values.pop("training")
            for name in ("box_coder", "proposal_matcher", "fg_bg_sampler"):
                values[name] = vars(values[name])
        assert settings[0] == settings[1], ending


@pytest.mark.parametrize("changes", [{}, {"norm": "batch", "roi_convolutions": 2}], ids=["paper", "scratch"])
def test_with_our_weights_the_peer_computes_our_losses_and_detections(changes):
    """So nothing but the attention and the speed differs; the backbone's names are torchvision's in both."""
    batch = dataclasses.replace(SMALL, height=64).batch()
    detector = dataclasses.replace(SMALL.detector, **changes)
    torch.manual_seed(0)
    ours = Detector(3, build_backbone(SMALL.backbone, SMALL.attention("none")), detector)
    peer = torchvision_detector(3, SMALL.backbone, detector)
    peer.load_state_dict(
        {
            name.replace("head.fpn", "backbone.fpn").removeprefix("head."): value
            for name, value in ours.state_dict().items()
        }
    )
    for network in (ours, peer):
        network.train()
    torch.manual_seed(1)
    expected = ours(batch.images, batch.targets)
    torch.manual_seed(1)
    found = peer([image / 255 for image in batch.images], batch.targets)
    assert found.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-5)
    for network in (ours, peer):
        network.eval()
    [expected], [found] = ours(batch.images), peer([image / 255 for image in batch.images])
    assert len(expected["boxes"]) > 0
    torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-3, atol=1e-2)


def test_a_peer_is_trained_and_scored(config, data):
    case = configured(config, data, steps=3, score_every=2)
    assert case.problem.configuration().seed == 3
    assert case.problem.configuration().clip == 10.0
    [part] = case.measure(case, Run())
    figures = part.figures
    assert figures["finished"]
    assert figures["steps"] == len(figures["losses"]) == 3
    assert [score["step"] for score in figures["scores"]] == [2, 3]
    assert figures["scores"][1]["minutes"] == figures["minutes"] > 0
    assert 0 <= figures["scores"][-1]["ap"] <= 1
    assert figures["scores"][-1]["num_images"] == 5
    table = case.table(Result(case.name, case.title, comparisons=[part]))
    assert table.header == ["step", "minutes", "AP", "AP50", "AP75"]
    assert [line[0] for line in table.cells] == ["2", "3"]
    assert "3 steps in" in table.notes[0]


def test_bf16_rounds_no_boxes(config, data):
    configuration = read_configuration([config], str(data))
    peer = Peer(configuration._replace(bf16=True))
    kinds, decoded = set(), []
    peer.network.get_submodule("rpn.head.conv").register_forward_hook(lambda m, i, output: kinds.add(output[0].dtype))
    decode = peer.network.rpn.box_coder.decode_single
    peer.network.rpn.box_coder.decode_single = lambda codes, boxes: (
        decoded.append((codes.dtype, boxes.dtype)) or decode(codes, boxes)
    )
    peer.train(1, None, 0, lambda text: None)
    assert kinds == {torch.bfloat16}
    assert set(decoded) == {(torch.float32, torch.float32)}
    exact = Peer(configuration)
    exact.train(1, None, 0, lambda text: None)
    assert peer.losses != exact.losses
    assert peer.losses == pytest.approx(exact.losses, rel=0.02)


def test_learning_rates_are_those_of_the_configuration(config, data, monkeypatch):
    peer = Peer(read_configuration([config], str(data)))
    rates = []
    step = peer.optimizer.step
    monkeypatch.setattr(peer.optimizer, "step", lambda: (rates.append(peer.optimizer.param_groups[0]["lr"]), step()))
    peer.train(4, None, 0, lambda text: None)
    schedule = peer.configuration.task.schedule
    # scaled from 8 images to 2
    assert rates == pytest.approx([0.005 * schedule.factor(index, 4) for index in range(4)])
    assert rates[0] == 0.0025


def test_time_bounds_the_training(config, data, monkeypatch):
    clock = iter(range(0, 10_000, 5))  # every look at it is 5 seconds later
    peer = Peer(read_configuration([config], str(data)), clock=lambda: float(next(clock)))
    totals = []
    factor = ScheduleSpec.factor
    monkeypatch.setattr(
        ScheduleSpec, "factor", lambda schedule, step, total: totals.append(total) or factor(schedule, step, total)
    )
    assert peer.train(None, 0.5, 0, lambda text: None)
    assert peer.steps == 6, "six steps of 5 seconds"
    groups = len(peer.optimizer.param_groups)
    assert totals[::groups] == [1, 6, 6, 6, 6, 6]


def test_an_interrupt_leaves_what_was_trained(config, data, monkeypatch, tmp_path, capsys):
    factor = ScheduleSpec.factor

    def interrupted(schedule, step, total):
        if step == 2:
            raise KeyboardInterrupt
        return factor(schedule, step, total)

    monkeypatch.setattr(ScheduleSpec, "factor", interrupted)
    arguments = ["--cases", "torchvision,overhead", "--config", str(config), "--root", str(data), "--steps", "9"]
    with pytest.raises(SystemExit) as stopped:
        main(BENCHMARK, [*arguments, "--threads", "1", "--output", str(tmp_path)])
    assert stopped.value.code == 130
    [result] = read_report(tmp_path / "detection.json").results
    figures = result.comparisons[0].figures
    assert figures["steps"] == 2
    assert not figures["finished"]
    assert [score["step"] for score in figures["scores"]] == [2]
    assert "ended early" in capsys.readouterr().out


def test_options_take_the_place_of_the_configurations(config, data, tmp_path):
    assert configured(config, data).problem.steps == 3, "of the configuration"
    case = configured(config, data, minutes=2.0, precision="bf16-mixed")
    assert case.problem.steps is None
    assert case.problem.configuration().bf16
    endless = tmp_path / "endless.yaml"
    endless.write_text("trainer: {max_steps: -1}", encoding="utf-8")
    with pytest.raises(ValueError, match="--steps or --minutes is needed"):
        Training(config=(str(config), str(endless)), root=str(data)).completed()


def test_frozen_layers_of_the_peer_keep_their_statistics():
    network = torchvision_detector(3, ResNetSpec("bottleneck14", width=8, trainable_layers=2), SMALL.detector)
    train_mode(network)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network([torch.rand(3, 64, 64)], SMALL.batch().targets)
    changed = {name.split(".")[2] for name, buffer in network.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"layer3", "layer4"}


def test_a_configuration_that_a_plain_loop_cannot_run_is_refused(config, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    for text, message in (
        ("trainer: {precision: 64-true}", "trainer.precision is 64-true; the peer trains in 32-true or bf16-mixed"),
        ("trainer: {callbacks: [{class_path: LearningRateMonitor}]}", "trainer.callbacks has a LearningRateMonitor"),
        ("data: {class_path: MiniatureTranslationDataModule}", "needs a DetectionTask and data"),
    ):
        overlay.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_configuration([config, overlay])
    averaging = "{class_path: lightning_attn.callbacks.ExponentialAveraging, init_args: {decay: 0.5}}"
    overlay.write_text(f"trainer: {{callbacks: [{averaging}]}}", encoding="utf-8")
    assert read_configuration([config, overlay]).averaging.decay == 0.5


def test_the_average_is_scored_where_the_configuration_has_one(config, data, tmp_path):
    overlay = tmp_path / "average.yaml"
    averaging = "{class_path: lightning_attn.callbacks.ExponentialAveraging, init_args: {decay: 0.5}}"
    overlay.write_text(f"trainer: {{callbacks: [{averaging}]}}", encoding="utf-8")
    peer = Peer(read_configuration([config, overlay], str(data)))
    weights = peer.network.get_submodule("rpn.head.cls_logits").weight
    kept = []
    peer.train(1, None, 0, lambda text: None)
    kept.append(weights.detach().clone())
    peer.train(2, None, 0, lambda text: None)
    kept.append(weights.detach().clone())
    # the decay of the first update that counts is 2 / 11
    average = peer.average.module.get_submodule("rpn.head.cls_logits").weight
    torch.testing.assert_close(average, kept[0] + 9 / 11 * (kept[1] - kept[0]))


def test_the_peers_categories_are_the_datas(config, data):
    peer = Peer(read_configuration([config], str(data)))
    assert peer.category_ids[1:].tolist() == sorted(CATEGORIES)
    assert peer.network.get_submodule("roi_heads.box_predictor.cls_score").out_features == len(CATEGORIES) + 1
