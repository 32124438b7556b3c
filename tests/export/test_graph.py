"""Exported programs: what they hold, and that they compute what the networks compute, on inputs of other sizes too."""

import itertools
import json
import sys

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_attn.attention import AttentionSpec, DeformableConv, DynamicConv, TransformerAttention
from lightning_attn.export.graph import SUFFIXES, ExportGraph, write_graph
from lightning_attn.export.networks import detection_graphs, export_graphs
from lightning_attn.networks.images.backbone import ResNetSpec, build_backbone
from lightning_attn.networks.images.heads.detection import DetectorSpec
from lightning_attn.networks.images.network import Detector
from lightning_attn.tasks import DetectionTask, OptimizerSpec, ScheduleSpec, SegmentationTask, TranslationTask
from lightning_attn.tasks.base import BaseTask

onnxruntime = pytest.importorskip("onnxruntime")

TERMS = ["".join(bits) for bits in itertools.product("01", repeat=4)][1:]
QUICK = ["--trainer.limit_val_batches", 0, "--trainer.max_steps", 2]


def written(program, folder, kind="program"):
    """The program, as a file's reader has it: a function of tensors."""
    path = folder / f"one{SUFFIXES[kind]}"
    assert write_graph(program, path, kind) <= 1e-5
    return loaded(path, kind)


def loaded(path, kind="program"):
    if kind == "onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        return lambda *inputs: tuple(
            torch.from_numpy(one)
            for one in session.run(None, {k: v.numpy() for k, v in zip(names, inputs, strict=True)})
        )
    exported = torch.export.load(str(path))
    spaces = {
        node.target.namespace
        for node in exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)  # what it needs to have imported before it is loaded
    }
    assert spaces <= {"aten", "torchvision"}
    return exported.module()


def randomised(module):
    """With every parameter drawn, so that no term or offset is zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3)
    return module.eval()


class Padded(nn.Module):
    """A module of sentences whose last keys may be padding."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, padding):
        return self.module(x, key_padding_mask=padding)


@pytest.mark.parametrize("terms", TERMS)
def test_sentences_of_any_length(terms, tmp_path):
    attention = randomised(TransformerAttention(8, 2, terms=terms, ndim=1, causal=True))
    x, padding = torch.randn(3, 7, 8), torch.zeros(3, 7, dtype=torch.bool)
    axes = {0: "sentences", 1: "tokens"}
    run = written(
        ExportGraph(Padded(attention), {"x": x, "padding": padding}, {"y": ""}, {"x": axes, "padding": axes}), tmp_path
    )
    attention.algorithm = "reference"
    for batch, length in ((3, 7), (2, 11), (1, 4), (5, 1), (1, 1)):
        x, padding = torch.randn(batch, length, 8), torch.zeros(batch, length, dtype=torch.bool)
        padding[-1, 2:] = True
        torch.testing.assert_close(run(x, padding), attention(x, key_padding_mask=padding), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("options", [{}, {"kv_stride": 2}, {"window": 3}])
def test_maps(terms, options, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_attn.attention.algorithms.dense.BLOCK_WEIGHTS", 500)  # several blocks of queries
    attention = randomised(TransformerAttention(8, 2, terms=terms, ndim=2, **options))
    run = written(ExportGraph(attention, {"x": torch.randn(2, 8, 5, 6)}, {"y": ""}), tmp_path)
    x = torch.randn(2, 8, 5, 6)
    attention.algorithm = "reference"
    torch.testing.assert_close(run(x), attention(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["program", "onnx"])
@pytest.mark.parametrize(
    "module",
    [
        lambda: DynamicConv(8, kernel_size=5, groups=2, ndim=2),
        lambda: DynamicConv(8, kernel_size=5, groups=2, ndim=1, causal=True),
        lambda: DeformableConv(8, 8, ndim=2, modulated=True),
        lambda: DeformableConv(8, 8, ndim=1, causal=True),
    ],
    ids=["dynamic, maps", "dynamic, sentences", "deformable, maps", "deformable, sentences"],
)
def test_convolutions(module, kind, tmp_path):
    convolution = randomised(module())
    shape = (2, 8, 6, 7) if convolution.ndim == 2 else (2, 9, 8)
    run = written(ExportGraph(convolution, {"x": torch.randn(shape)}, {"y": ""}), tmp_path, kind)
    x = torch.randn(shape)
    found = run(x)
    convolution.algorithm = "reference"
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, convolution(x), rtol=1e-4, atol=1e-5)


# Detectors


def drawn_detector(**fields):
    """A detector whose scores spread, so that no two are equal."""
    torch.manual_seed(0)
    second_stage = {} if fields.get("head") == "retinanet" else {"fc_dim": 16}
    spec = DetectorSpec(fpn_channels=8, anchor_sizes=(16, 32, 64, 96, 128), **second_stage, **fields)
    backbone = build_backbone(ResNetSpec(name="bottleneck14", width=8), AttentionSpec(terms="0011", num_heads=2))
    detector = Detector(3, backbone, spec).eval()
    heads = {name: value for name, value in detector.head.named_parameters() if "fpn" not in name}
    with torch.no_grad():
        for name, value in heads.items():
            if name.endswith("weight"):
                value.normal_(0, 0.5 / value[0].numel() ** 0.5 * (4 if "cls" in name else 1))
    return detector


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({}, "program"),
        ({"box_voting": 0.6}, "program"),
        ({"box_voting": 0.6}, "onnx"),
        ({"head": "retinanet", "score_threshold": 0.0}, "program"),
        ({"score_threshold": 1.0}, "program"),
        pytest.param({"score_threshold": 1.0, "box_voting": 0.6}, "onnx", marks=pytest.mark.slow),
    ],
)
def test_detectors(fields, kind, tmp_path):
    detector = drawn_detector(**fields)
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    run = written(detection_graphs(detector, image)["detector"], tmp_path, kind)
    for _ in range(3):
        image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
        boxes, labels, scores = run(image)
        (expected,) = detector([image])
        assert len(boxes) == (0 if fields.get("score_threshold") else 100)
        torch.testing.assert_close(scores, expected["scores"], rtol=1e-4, atol=1e-5)
        # Neighbours whose scores are the same but for rounding may change places.
        same = (labels == expected["labels"]) & ((boxes - expected["boxes"]).abs() < 1e-2).all(1)
        assert same.float().mean() > 0.95 if len(same) else True


# Files


@pytest.mark.parametrize("kind", ["program", "onnx"])
def test_a_detection_task(run, detection_config, in_folder, kind):
    run("fit", "-c", detection_config, *QUICK, "--model.detector.score_threshold", 0.05)
    checkpoint = in_folder / "checkpoints" / "detection" / "tiny" / "last.ckpt"
    printed = run("export", "--ckpt_path", checkpoint, "--format", kind, "--output", "out")
    assert f"was written to out/detector{SUFFIXES[kind]}; see programs.json" in printed
    described = json.loads((in_folder / "out" / "programs.json").read_text())[f"detector{SUFFIXES[kind]}"]
    assert described["inputs"] == {"image": {"dtype": "uint8", "shape": [3, 48, 80]}}  # what the data is resized to
    task = DetectionTask.load("out/model.safetensors")
    image = torch.randint(256, (3, 48, 80), dtype=torch.uint8)
    scores = loaded(in_folder / "out" / f"detector{SUFFIXES[kind]}", kind)(image)[2]
    torch.testing.assert_close(scores, task.built_network([image])[0]["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["program", "onnx"])
def test_a_segmentation_task(run, segmentation_config, in_folder, kind):
    run("fit", "-c", segmentation_config, *QUICK)
    export = ["export", "--ckpt_path", in_folder / "checkpoints" / "segmentation" / "tiny" / "last.ckpt"]
    export += ["--format", kind, "--output", "out"]
    assert "size: an exported graph is for images of one size, and none was given" in run(*export, status=2)
    assert "and got 0 48. Give height and width" in run(*export, "--size", 0, 48, status=2)
    assert not (in_folder / "out").exists()
    run(*export, "--size", 33, 50)
    image = torch.randint(256, (3, 33, 50), dtype=torch.uint8)
    found = loaded(in_folder / "out" / f"segmenter{SUFFIXES[kind]}", kind)(image)
    (expected,) = SegmentationTask.load("out/model.safetensors").built_network([image])
    torch.testing.assert_close(found[0] if kind == "onnx" else found, expected, rtol=1e-3, atol=1e-4)
    assert "already exists and is not overwritten" in run(*export, "--size", 33, 50, status=2)


@pytest.mark.parametrize("kind", ["program", "onnx"])
def test_a_translation_task(run, tiny_config, in_folder, kind):
    """Greedy decoding as docs/resuming.md has it, which needs neither this package nor a checkpoint."""
    run("fit", "-c", tiny_config, "--trainer.max_steps", 40, "--trainer.limit_val_batches", 0)
    checkpoint = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    export = ["export", "--ckpt_path", checkpoint, "--format", kind, "--output", "out"]
    assert "size is for tasks on images" in run(*export, "--size", 5, 5, status=2)
    run(*export)
    encoder, decoder = (loaded(in_folder / "out" / f"{name}{SUFFIXES[kind]}", kind) for name in ("encoder", "decoder"))
    if kind == "onnx":
        encoder, decoder = (lambda *inputs, one=one: one(*inputs)[0] for one in (encoder, decoder))
    stored = load_file("out/model.safetensors")["vocabulary"]
    pieces = sentencepiece.SentencePieceProcessor(model_proto=bytes(stored.numpy()))
    task = TranslationTask.load(checkpoint)
    for text in ("The woman reads a book.", "Two"):
        source = torch.tensor([[*pieces.encode(text), pieces.eos_id()]])
        memory, target = encoder(source), torch.tensor([[pieces.bos_id()]])
        state, step = task.built_network.start_decoding(source), torch.tensor([pieces.bos_id()])
        for _ in range(8):
            logits = decoder(target, memory, source)
            torch.testing.assert_close(logits, state.step(step), rtol=1e-3, atol=1e-4)
            step = logits.argmax(1)
            target = torch.cat((target, step[:, None]), 1)


# What cannot be exported


class DependsOnNumbers(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


class IsOtherwiseExported(nn.Module):
    def forward(self, x):
        return x + 1 if torch.compiler.is_exporting() else x


class HasNoOperatorInONNX(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x).real


@pytest.mark.parametrize(
    ("module", "kind", "message"),
    [
        (
            DependsOnNumbers(),
            "program",
            r"one\.pt2: torch\.export cannot export this network: .*[Dd]ata-dependent",
        ),
        (IsOtherwiseExported(), "program", r"one\.pt2: outputs of the exported program differ by 1 from"),
        (HasNoOperatorInONNX(), "onnx", r"one\.pt2: this network cannot be exported to ONNX: .*--format program"),
    ],
)
def test_what_has_no_program(module, kind, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_graph(ExportGraph(module, {"x": torch.ones(3, 3)}, {"y": ""}), tmp_path / "one.pt2", kind)
    assert not list(tmp_path.iterdir())


def test_other_errors(run, tiny_config, in_folder, monkeypatch):
    run("fit", "-c", tiny_config, *QUICK)
    checkpoint = in_folder / "checkpoints" / "translation" / "tiny" / "last.ckpt"
    assert "size is for the formats program and onnx" in run(
        "export", "--ckpt_path", checkpoint, "--size", 5, 5, status=2
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    printed = run("export", "--ckpt_path", checkpoint, "--format", "onnx", "--output", "out", status=2)
    assert "pip install 'generalized-attention[onnx]'" in printed
    assert not (in_folder / "out").exists()


def test_a_task_without_graphs_says_what_it_must_define():
    class Own(BaseTask):
        pass

    with pytest.raises(NotImplementedError, match=r"Own must define export_graphs\(self, size\) for export"):
        export_graphs(Own(OptimizerSpec(), ScheduleSpec()))
