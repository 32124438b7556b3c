import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ranks
import torch
from cityscapes_data import write_cityscapes
from coco_data import COUNTS, write_coco

from datamodules.miniature.translation import write_miniature_corpus
from lightning_attn.cli import main

REPOSITORY = Path(__file__).parents[1]

SHORT_TRAINING = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 4
  val_check_interval: 2
  check_val_every_n_epoch: null
  log_every_n_steps: 1
"""

SMALL_DETECTOR = (
    "{fpn_channels: 8, anchor_sizes: [8, 10, 12, 14, 16], nms_threshold: 0.7, roi_canonical_size: 32, fc_dim: 16, "
    "rpn_post_nms_top_n_train: 50, rpn_post_nms_top_n_test: 300, roi_batch_size: 16, score_threshold: 0.0}"
)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A small corpus in the official layout, with an odd number of test sentences."""
    root = tmp_path_factory.mktemp("corpus")
    write_miniature_corpus(root, {"train": 400, "valid": 20, "test": 31})
    return root


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory, corpus) -> Path:
    """A complete configuration that trains in a second."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        f"""
model:
  class_path: TranslationTask
  init_args:
    self_attention: {{num_heads: 2, scale: 0.25}}
    cross_attention: {{num_heads: 2, scale: 0.25}}
    dim: 16
    hidden_dim: 32
    encoder_layers: 1
    decoder_layers: 1
    dropout: 0.0
    norm_position: pre
    optimizer: {{learning_rate: 0.01}}
    schedule: {{name: constant, warmup_steps: 0}}
    decoding: {{beam_size: 2, max_length_offset: 5}}
data:
  class_path: WMT14DataModule
  init_args:
    root: {corpus}
    vocabulary_size: 300
    max_tokens: 400
    preparation_processes: 1
{SHORT_TRAINING}  num_sanity_val_steps: 0
  limit_val_batches: 1
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """Detection data in the official layout, with an odd number of test images."""
    return write_coco(tmp_path_factory.mktemp("coco") / "data", {**COUNTS, "test2017": 5})


@pytest.fixture(scope="session")
def detection_config(tmp_path_factory, coco) -> Path:
    """A complete configuration that trains in seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        f"""
model:
  class_path: DetectionTask
  init_args:
    attention: {{terms: "0010", convolution: deformable, num_heads: 2}}
    backbone: {{name: bottleneck14, width: 8, norm: group}}
    detector: {SMALL_DETECTOR}
    optimizer: {{name: sgd, learning_rate: 0.05, weight_decay: 1.0e-4, base_batch_size: 8}}
    schedule: {{name: multistep, warmup_steps: 1, warmup_start: 0.5, milestones: [0.75]}}
    num_pictures: 2
    picture_score: 0.0
data:
  class_path: COCODataModule
  init_args: {{root: {coco}, batch_size: 2, test_split: test2017, min_size: 48, max_size: 80}}
{SHORT_TRAINING}  num_sanity_val_steps: 1
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def photos(coco, tmp_path) -> Path:
    """Seven pictures with names as exports give them, of which two are damaged and one is none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    source = sorted((coco / "test2017").iterdir())
    for number, name in enumerate(("frame.0001.png", "frame.0002.png", "more/frame.0001.png", "a.png")):
        (folder / name).write_bytes(source[number].read_bytes())
    for name in ("cut.png", "more/cut.png"):
        (folder / name).write_bytes(source[0].read_bytes()[:200])
    (folder / "text.jpg").write_text("no picture")
    return folder


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory) -> Path:
    """Segmentation data in the official layout, with an odd number of test images."""
    return write_cityscapes(tmp_path_factory.mktemp("cityscapes") / "data", {"train": 7, "val": 3, "test": 5})


@pytest.fixture(scope="session")
def segmentation_config(tmp_path_factory, cityscapes) -> Path:
    """A complete configuration that trains in seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        f"""
model:
  class_path: SegmentationTask
  init_args:
    attention: {{terms: "0010", convolution: deformable, num_heads: 2}}
    backbone: {{name: bottleneck14, width: 8, norm: group}}
    segmenter: {{head_channels: 16, norm: group}}
    optimizer: {{name: adamw, learning_rate: 0.02, base_batch_size: 8}}
    schedule: {{name: poly, warmup_steps: 1, warmup_start: 0.5}}
    num_pictures: 2
data:
  class_path: CityscapesDataModule
  init_args: {{root: {cityscapes}, batch_size: 2, test_split: test, crop_size: [32, 48]}}
{SHORT_TRAINING}  num_sanity_val_steps: 1
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def multitask_config(tmp_path_factory, coco, cityscapes) -> Path:
    """A complete configuration of two tasks with one backbone, at strides 32 and 8, that trains in seconds."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(
        f"""
model:
  class_path: MultitaskTask
  init_args:
    attention: {{terms: "0010", convolution: deformable, num_heads: 2}}
    backbone: {{name: bottleneck14, width: 8, norm: group}}
    optimizer: {{name: sgd, learning_rate: 0.05, weight_decay: 1.0e-4}}
    schedule: {{name: multistep, warmup_steps: 1, warmup_start: 0.5, milestones: [0.75]}}
    tasks:
      detection:
        class_path: DetectionTask
        init_args:
          detector: {SMALL_DETECTOR}
          num_pictures: 2
          picture_score: 0.0
      segmentation:
        class_path: SegmentationTask
        init_args:
          segmenter: {{head_channels: 16, norm: group}}
          num_pictures: 2
data:
  class_path: MultitaskDataModule
  init_args:
    members:
      detection:
        class_path: COCODataModule
        init_args: {{root: {coco}, batch_size: 2, test_split: test2017, min_size: 48, max_size: 80}}
      segmentation:
        class_path: CityscapesDataModule
        init_args: {{root: {cityscapes}, batch_size: 2, test_split: test, crop_size: [32, 48]}}
{SHORT_TRAINING}  num_sanity_val_steps: 1
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def in_folder(tmp_path, monkeypatch) -> Path:
    """Runs the test in an empty folder, as a user would from anywhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return tmp_path


@pytest.fixture
def run(in_folder, capfd, caplog) -> Callable[..., str]:
    """Calls the command in this process and returns what it printed; a failure must be asked for by status."""

    def call(*arguments: object, status: int = 0) -> str:
        capfd.readouterr()
        caplog.clear()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        printed = caplog.text + "".join(capfd.readouterr())
        assert code == status, printed
        return printed

    return call


@pytest.fixture
def run_process(in_folder) -> Callable[..., subprocess.CompletedProcess]:
    """Calls train.py in a process of its own."""

    def call(*arguments: object, status: int = 0, **variables: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "train.py"), *map(str, arguments)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
            capture_output=True,
            text=True,
            timeout=1500,
            check=False,
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done

    return call


@pytest.fixture
def run_ranks(in_folder, tmp_path_factory) -> Callable[..., str]:
    """Calls the command in two ranks and returns what they printed."""

    def call(*arguments: object) -> str:
        output = tmp_path_factory.mktemp("ranks") / "printed.txt"
        two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        return ranks.run_ranks(main, [*map(str, arguments), *two], 2, unused_port(), output)

    return call


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    return unused_port()


@pytest.fixture
def serve() -> Iterator[Callable[[type[BaseHTTPRequestHandler]], str]]:
    """Starts servers at 127.0.0.1, each of which answers with a handler, and returns their addresses."""
    with ExitStack() as stack:

        def start(handler: type[BaseHTTPRequestHandler]) -> str:
            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), handler))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield start


@pytest.fixture(autouse=True)
def compiler(request) -> None:
    """Skips what torch's inductor compiles where there is no C++ compiler."""
    if "by_inductor" in request.node.name and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        pytest.skip("no C++ compiler, which torch.compile needs")


@pytest.fixture(autouse=True)
def same_randomness() -> None:
    torch.manual_seed(0)
