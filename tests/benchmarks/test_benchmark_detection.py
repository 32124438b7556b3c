"""The detection benchmark runs in a small form, compares like with like, and reports what it measured."""

import dataclasses
import json

import pytest
import torch
from coco_data import CATEGORIES, write_coco
from lightning_attn.networks.images.detection import Detector, DetectorSpec
from torch import nn
from torchvision.models import resnet18, resnet50

from benchmarks import detection
from benchmarks.detection import (
    ATTENTIONS,
    BARE,
    DEFORMABLE_ALONE,
    REGULAR_ALONE,
    TRAINER,
    Part,
    Peer,
    Problem,
    detectors,
    forward_and_backward,
    measure_attention,
    measure_overhead,
    notes,
    read_configuration,
    table,
    torchvision_detector,
    torchvision_resnet,
    train_peer,
)
from benchmarks.measure import Memory, Side, Timing
from lightning_attn.networks.images.backbone import ResNetSpec, build_resnet
from lightning_attn.tasks import DetectionTask

SMALL = Problem(
    ResNetSpec("bottleneck14", width=8),
    DetectorSpec(
        fpn_channels=8,
        anchor_sizes=(8.0, 12.0, 16.0, 24.0, 32.0),
        fc_dim=16,
        rpn_post_nms_top_n_train=50,
        rpn_pre_nms_top_n_train=60,
        roi_batch_size=16,
    ),
    images=1,
    height=48,
    width=64,
    boxes=2,
    classes=3,
    heads=2,
)
FROZEN = dataclasses.replace(SMALL, backbone=dataclasses.replace(SMALL.backbone, norm="frozen", trainable_layers=3))
PROBLEMS = {"overhead": SMALL, "attention": FROZEN, "memory": FROZEN}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


def side(*seconds, peak=None):
    return Side(timing=Timing(seconds) if seconds else None, memory=None if peak is None else Memory(10**9, peak))


def test_boxes_of_a_problem_lie_in_its_images():
    batch = dataclasses.replace(SMALL, images=3, boxes=20).batch()
    assert len(batch) == len(batch.images) == len(batch.targets) == 3
    for image, target in zip(batch.images, batch.targets, strict=True):
        assert image.shape == (3, 48, 64)
        assert image.dtype == torch.uint8
        boxes = target["boxes"]
        assert (boxes[:, 2:] - boxes[:, :2] > 4).all()
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([64, 48, 64, 48])).all()
        assert set(target["labels"].tolist()) == {1, 2, 3}
    assert Problem.from_dict(json.loads(json.dumps(dataclasses.asdict(SMALL)))).batch().images[0].shape == (3, 48, 64)


# overhead


def test_trainer_and_bare_loop_compute_the_same_losses():
    part = measure_overhead(SMALL, repetitions=2)
    part.judge()
    bare, trainer = part.figures["losses"][BARE], part.figures["losses"][TRAINER]
    assert bare[0] == trainer[0]
    assert bare == pytest.approx(trainer, rel=1e-5)
    assert len(set(bare)) == len(bare) == 6, "three steps before those that count, and one after"
    assert len(part.sides[BARE].timing.seconds) == len(part.sides[TRAINER].timing.seconds) == 2
    [target] = part.targets
    assert target.value == part.sides[TRAINER].timing.median / part.sides[BARE].timing.median
    assert target.bound == 1.03


def test_time_of_the_task_falls_on_the_trainer_and_that_of_the_optimizer_on_both(monkeypatch):
    now = [0.0]

    def lasting(seconds, function):
        def run(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(detection.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(DetectionTask, "log_dict", lasting(0.25, DetectionTask.log_dict))
    monkeypatch.setattr(torch.optim.SGD, "zero_grad", lasting(1.0, torch.optim.SGD.zero_grad))
    part = measure_overhead(SMALL, repetitions=2)
    part.judge()
    assert part.sides[BARE].timing.seconds == (1.0, 1.0)
    assert part.sides[TRAINER].timing.seconds == (1.25, 1.25)
    assert [(target.value, target.verdict) for target in part.targets] == [(1.25, "not met")]


# attention


def test_all_sides_compute_the_same_losses_at_the_start():
    batch = FROZEN.batch()
    losses = {name: forward_and_backward(network, batch) for name, network in detectors(FROZEN, ATTENTIONS).items()}
    assert set(losses) == {"none", "0010", "1111 stride 2", "1111", "0010 deformable", "none deformable"}
    assert all(value > 0 for value in losses["none"].values())
    for name, found in losses.items():
        assert found == pytest.approx(losses["none"], rel=1e-4), name


def test_sides_are_the_attentions_that_they_are_called():
    def count(side, name):
        modules = detectors(FROZEN, [side])[side].modules()
        return sum(type(module).__name__ == name for module in modules)

    # conv4 and conv5 have a block each
    assert [count(name, "TransformerAttention") for name in ATTENTIONS] == [0, 2, 2, 2, 2, 0]
    assert [count(name, "DeformableConv") for name in ATTENTIONS] == [0, 0, 0, 0, 2, 2]
    strides = {FROZEN.attention(name).kv_stride for name in ("1111", "1111 stride 2")}
    assert strides == {1, 2}


def test_attention_is_timed_with_its_convolutions():
    part = measure_attention(FROZEN, ["0010 deformable", "0010"], repetitions=2)
    part.judge()
    assert list(part.sides) == ["none", "0010 deformable", "0010", DEFORMABLE_ALONE, REGULAR_ALONE]
    assert all(len(one.timing.seconds) == 2 for one in part.sides.values())
    [target] = part.targets
    assert target.name == "0010 / none"
    assert target.value == part.sides["0010"].timing.median / part.sides["none"].timing.median
    share = part.figures["deformable_share"]["0010 deformable"]
    assert share == part.sides[DEFORMABLE_ALONE].timing.median / part.sides["0010 deformable"].timing.median
    assert f"0010 deformable: its deformable convolutions are {100 * share:.0f} % of it" in notes(part)[0]


def test_convolutions_alone_reach_every_parameter():
    networks = detectors(FROZEN, ["none", "none deformable"])
    deformable, regular = networks["none deformable"], networks["none"]
    for run in detection.convolutions_alone(deformable, regular, FROZEN.batch()).values():
        run()
    for network, kind in ((deformable, detection.DeformableConv), (regular, nn.Conv2d)):
        body = network.get_submodule("network.backbone.body")
        alone = [body.layer3[0].conv2, body.layer4[0].conv2]
        assert all(isinstance(module, kind) for module in alone)
        used = {id(parameter) for module in alone for parameter in module.parameters()}
        assert {id(parameter) for parameter in network.parameters() if parameter.grad is not None} == used


# memory


@pytest.mark.parametrize("name", ["backbone", "detector"])
def test_memory_of_a_process(name):
    request = json.loads(json.dumps({"side": name, "problem": dataclasses.asdict(FROZEN)}))
    one = Side.from_dict(json.loads(json.dumps(detection.answer(request))))
    assert one.memory.peak >= one.memory.before > 100_000_000
    assert len(one.timing.seconds) >= 2


@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process():
    one = detection.memory_of("detector", FROZEN, threads=1)
    assert one.memory is not None, one.error
    assert one.memory.peak >= one.memory.before > 100_000_000


@pytest.mark.parametrize("name", ["backbone", "detector"])
def test_memory_is_that_of_a_training_step(name, monkeypatch):
    networks = []
    sgd = torch.optim.SGD
    monkeypatch.setattr(
        torch.optim, "SGD", lambda p, **options: networks.append(list(p)) or sgd(networks[-1], **options)
    )
    step = detection.memory_step(name, FROZEN)
    before = [parameter.detach().clone() for parameter in networks[0]]
    step()
    changed = [not torch.equal(a, b) for a, b in zip(before, networks[0], strict=True)]
    assert sum(changed) > 0.7 * len(changed), "attention waits for its factor, which starts at zero"


def test_both_are_judged(monkeypatch):
    sides = {"backbone": side(peak=9 * 10**9), "detector": side(peak=25 * 10**9)}
    monkeypatch.setattr(detection, "memory_of", lambda name, problem, threads: sides[name])
    part = detection.measure_memory(FROZEN, 1, lambda text: None)
    part.judge()
    assert [(target.value, target.verdict) for target in part.targets] == [(9.0, "met"), (25.0, "not met")]


# torchvision


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
    ours = Detector(3, backbone, SMALL.attention("none"), SMALL.detector)

    def shapes(network, only_trained):
        parameters = network.parameters()
        return sorted(tuple(p.shape) for p in parameters if p.requires_grad or not only_trained)

    assert shapes(peer, False) == shapes(ours, False)
    assert shapes(peer, True) == shapes(ours, True)
    for ending in ("rpn", "roi_heads"):
        settings = [
            {name: value for name, value in vars(network.get_submodule(ending)).items() if not name.startswith("_")}
            for network in (peer, ours.get_submodule("network"))
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
    ours = Detector(3, SMALL.backbone, SMALL.attention("none"), detector)
    peer = torchvision_detector(3, SMALL.backbone, detector)
    peer.load_state_dict(ours.get_submodule("network").state_dict())
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
    configuration = read_configuration([config], str(data))
    assert configuration.seed == 3
    assert configuration.clip == 10.0
    part = train_peer(configuration, steps=3, minutes=None, score_every=2)
    figures = part.figures
    assert figures["finished"]
    assert figures["steps"] == len(figures["losses"]) == 3
    assert [score["step"] for score in figures["scores"]] == [2, 3]
    assert figures["scores"][1]["minutes"] == figures["minutes"] > 0
    assert 0 <= figures["scores"][-1]["ap"] <= 1
    assert figures["scores"][-1]["num_images"] == 5
    header, cells = table(part)
    assert header == ["step", "minutes", "AP", "AP50", "AP75"]
    assert [line[0] for line in cells] == ["2", "3"]
    assert "3 steps in" in notes(part)[0]


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
    peer = Peer(read_configuration([config], str(data)))
    clock = iter(range(0, 10_000, 5))  # every look at it is 5 seconds later
    monkeypatch.setattr(detection.time, "perf_counter", lambda: float(next(clock)))
    totals = []
    step = peer._step
    monkeypatch.setattr(peer, "_step", lambda batches, total: (totals.append(total), step(batches, total)))
    assert peer.train(None, 0.5, 0, lambda text: None)
    assert peer.steps == 6, "six steps of 5 seconds"
    assert totals == [1, 6, 6, 6, 6, 6]


def test_an_interrupt_leaves_what_was_trained(config, data, monkeypatch, tmp_path, capsys):
    step = Peer._step

    def interrupted(self, batches, total):
        if self.steps == 2:
            raise KeyboardInterrupt
        step(self, batches, total)

    monkeypatch.setattr(Peer, "_step", interrupted)
    arguments = ["--parts", "torchvision,overhead", "--config", str(config), "--root", str(data), "--steps", "9"]
    detection.main([*arguments, "--threads", "1", "--output", str(tmp_path)], PROBLEMS)
    [part] = json.loads((tmp_path / "detection.json").read_text(encoding="utf-8"))["parts"]
    assert part["figures"]["steps"] == 2
    assert not part["figures"]["finished"]
    assert [score["step"] for score in part["figures"]["scores"]] == [2]
    assert "ended early" in capsys.readouterr().out


def test_frozen_layers_of_the_peer_keep_their_statistics():
    network = torchvision_detector(3, ResNetSpec("bottleneck14", width=8, trainable_layers=2), SMALL.detector)
    detection._train_mode(network)
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network([torch.rand(3, 64, 64)], SMALL.batch().targets)
    changed = {name.split(".")[2] for name, buffer in network.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"layer3", "layer4"}


# all together


def test_ratios_and_verdicts_come_from_the_numbers():
    part = Part("overhead", {BARE: side(1.0, 3.0, 2.0), TRAINER: side(2.1, 2.1, 9.0)})
    part.judge()
    assert [(target.value, target.verdict) for target in part.targets] == [(1.05, "not met")]
    sides = {"none": side(2.0), "0010": side(2.1), "1111 stride 2": side(3.2), "1111": side(9.0)}
    part = Part("attention", sides, {"deformable_share": {}})
    part.judge()
    assert [(target.name, target.value, target.verdict) for target in part.targets] == [
        ("0010 / none", 1.05, "met"),
        ("1111 stride 2 / none", 1.6, "not met"),
    ]
    part.sides["0010"] = Side(error="RuntimeError: no")
    part.judge()
    assert part.targets[0].verdict == "not measured"
    assert table(part) == (
        ["side", "ms", "quartiles", "time / none"],
        [
            ["none", "2000", "2000-2000", "1.000"],
            ["0010", "RuntimeError: no", "", ""],
            ["1111 stride 2", "3200", "3200-3200", "1.600"],
            ["1111", "9000", "9000-9000", "4.500"],
        ],
    )
    part = Part("memory", {"backbone": side(peak=25 * 10**9), "detector": Side(error="ended by signal 9")})
    part.judge()
    assert [target.verdict for target in part.targets] == ["not met", "not measured"]
    assert table(part)[1] == [["backbone", "25.00", "24.00"], ["detector", "ended by signal 9", ""]]


def test_a_run_leaves_its_files(tmp_path, capsys, config, data):
    arguments = ["--parts", "overhead,attention,memory,torchvision", "--sides", "0010", "--no-memory"]
    arguments += ["--repetitions", "2", "--threads", "1", "--config", str(config), "--root", str(data)]
    detection.main([*arguments, "--output", str(tmp_path)], PROBLEMS)
    assert {path.name for path in tmp_path.iterdir()} == {"detection.json", "detection.md"}
    figures = json.loads((tmp_path / "detection.json").read_text(encoding="utf-8"))
    assert [part["name"] for part in figures["parts"]] == ["overhead", "attention", "torchvision"]
    assert figures["parts"][2]["figures"]["steps"] == 3, "of the configuration"
    assert figures["problems"]["attention"]["backbone"]["norm"] == "frozen"
    text = (tmp_path / "detection.md").read_text(encoding="utf-8")
    for heading in ("## Overhead", "## Attention", "## Torchvision", "Trainer / bare loop"):
        assert heading in text
    printed = capsys.readouterr().out
    assert "Trainer / bare loop" in printed
    assert "0010 / none" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "overheads"], "--parts overheads: there are overhead,attention,memory,torchvision"),
        (["--sides", "1110"], "--sides 1110: there are none,0010,1111 stride 2"),
        (["--parts", "torchvision"], "--parts torchvision needs --config FILE"),
        (["--minutes", "0"], "0 is not a number above 0"),
        (["--parts", "torchvision", "--config", "nothing.yaml"], "--config: "),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        detection.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


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


def test_damping_is_on_the_last_normalisation_of_a_block():
    backbone = build_resnet(FROZEN.backbone, FROZEN.attention("none"))
    detection.damp(backbone)
    assert backbone.layer1[0].bn3.weight.unique().tolist() == pytest.approx([0.2])
    assert backbone.layer1[0].bn2.weight.unique().tolist() == [1.0]
