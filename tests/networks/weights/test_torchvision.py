"""Pretrained weights: what is taken, what is refused, and what the messages say."""

import hashlib
import io
import logging
from http.server import BaseHTTPRequestHandler

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import ResNet50_Weights

from lightning_attn.attention import AttentionSpec
from lightning_attn.networks.images.backbone import ResNetSpec, build_resnet
from lightning_attn.networks.weights.torchvision import (
    load_weights,
    names_added_by_attention,
    read_weights,
    weight_names,
)

NONE = AttentionSpec(mechanism="none")
ATTENDED = AttentionSpec(num_heads=2, convolution="deformable")


def small(**fields):
    return ResNetSpec(**{"name": "bottleneck14", "width": 8} | fields)


@pytest.fixture
def state():
    """A classifier's state as torchvision's files have it."""
    torch.manual_seed(5)
    state = dict(build_resnet(small(), NONE).state_dict())
    return {name: torch.rand_like(value, dtype=torch.float) for name, value in state.items()} | {
        "fc.weight": torch.zeros(10, 256),
        "fc.bias": torch.zeros(10),
    }


@pytest.fixture
def file(tmp_path, state):
    path = tmp_path / "backbone.pth"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("norm", ["frozen", "batch", "sync"])
@pytest.mark.parametrize("counters", [True, False])
def test_file_fills_the_network_and_leaves_attention_as_it_starts(file, state, norm, counters, caplog):
    if not counters:  # files written before torch 0.4.1
        torch.save({name: value for name, value in state.items() if "num_batches" not in name}, file)
    caplog.set_level(logging.INFO, "lightning_attn")
    network = build_resnet(small(weights=str(file), norm=norm), ATTENDED)
    loaded = network.state_dict()
    for name, value in state.items():
        if not name.startswith("fc.") and "num_batches" not in name:
            assert torch.equal(loaded[name], value), name
    assert network.layer3[0].attention.gamma == 0
    assert not network.layer4[0].conv2.offset.weight.any()
    new = names_added_by_attention(network)
    assert {name.split(".")[3] for name in new if ".attention." in name} == {"gamma", "attention"}
    assert {name.partition("conv2.")[2] for name in new if "conv2" in name} == {"offset.weight", "offset.bias"}
    assert (
        f"tensors read from bottleneck14, weights {file}; {len(new)} of the attention keep their initialisation"
        in caplog.text
    )


def test_basic_blocks_take_weights_too(tmp_path):
    peer = torchvision.models.resnet18()
    torch.save(peer.state_dict(), tmp_path / "r18.pth")
    network = build_resnet(ResNetSpec("resnet18", weights=str(tmp_path / "r18.pth")), ATTENDED)
    assert torch.equal(network.layer4[1].conv1.weight, peer.layer4[1].conv1.weight)
    assert torch.equal(network.bn1.running_var, peer.bn1.running_var)


def test_attention_is_taken_where_the_file_has_it(tmp_path):
    trained = build_resnet(small(), ATTENDED)
    nn.init.constant_(trained.layer3[0].attention.gamma, 0.3)
    torch.save(trained.state_dict(), tmp_path / "attended.pth")
    network = build_resnet(small(weights=str(tmp_path / "attended.pth")), ATTENDED)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match=r"unexpected: .*layer3\.0\.attention\.gamma") as refused:
        build_resnet(small(weights=str(tmp_path / "attended.pth")), NONE)
    assert "layer4.0.conv2.offset.weight" in str(refused.value)


def test_misfits_are_listed_and_nothing_is_changed(state):
    network = build_resnet(small(), ATTENDED)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    del state["layer1.0.conv1.weight"], state["layer4.0.bn3.running_mean"]
    state["layer5.0.conv1.weight"] = torch.zeros(1)
    state["conv1.weight"] = torch.zeros(8, 1, 7, 7)
    with pytest.raises(ValueError, match="weights of here do not fit the network") as refused:
        load_weights(network, state, "here")
    message = str(refused.value)
    assert "2 missing: layer1.0.conv1.weight, layer4.0.bn3.running_mean" in message
    assert "1 unexpected: layer5.0.conv1.weight" in message
    assert "1 of another shape: conv1.weight (8, 1, 7, 7), not (8, 3, 7, 7)" in message
    assert "Choose the architecture, width and norm" in message
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_group_norm_refuses_statistics(file):
    with pytest.raises(ValueError, match=r"unexpected: bn1\.running_mean"):
        build_resnet(small(weights=str(file), norm="group"), NONE)


def test_names():
    assert weight_names("resnet50") == ["IMAGENET1K_V1", "IMAGENET1K_V2"]
    assert weight_names("bottleneck26") == []


@pytest.mark.parametrize(
    ("weights", "architecture", "message"),
    [
        ("IMAGENET1K_V3", "resnet50", r"weights='IMAGENET1K_V3' is neither one of torchvision's for resnet50 \(IMAGEN"),
        (
            "IMAGENET1K_V1",
            "bottleneck14",
            "weights='IMAGENET1K_V1' is neither a name of torchvision's nor a file. Give",
        ),
        ("no/such.pth", "resnet18", r"nor a file\. Give the path of a file from torch\.save\(module\.state_dict"),
        (".", "resnet18", "nor a file but a folder"),
    ],
)
def test_what_is_not_there(weights, architecture, message):
    with pytest.raises(FileNotFoundError, match=message):
        read_weights(weights, architecture)


class _Harmful:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_bad_files(tmp_path, file, capfd):
    whole = file.read_bytes()
    contents = {
        "cut.pth": whole[: len(whole) // 2],
        "text.pth": b"<html>not found</html>",
        "empty.pth": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    way_out = r"\. Write the file by torch\.save"
    for name in contents:
        with pytest.raises(ValueError, match=rf"{name}' is damaged.*{way_out}"):
            read_weights(str(tmp_path / name), "resnet18")
    large = {"a": torch.zeros(1).expand(10**11)}
    for zipped in (True, False):
        for value, message in (
            (_Harmful(), r"objects other than tensors and plain values \(print\)"),
            (large, "a claims"),
        ):
            torch.save(value, tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match=rf"bad\.pth' .*{message}.*{way_out}"):
                read_weights(str(tmp_path / "bad.pth"), "resnet18")
    assert "unpickled" not in capfd.readouterr().out
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_weights(str(tmp_path / "old.pth"), "resnet18")["a"], torch.ones(3)), "torch before 1.6"

    for value, message in [
        ([torch.zeros(1)], "contains a list, not tensors by name"),
        ({}, "is an empty mapping"),
        ({"state_dict": {"conv1.weight": torch.zeros(1)}, "epoch": 3}, "these are not: state_dict, epoch"),
    ]:
        torch.save(value, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=message):
            read_weights(str(tmp_path / "other.pth"), "resnet18")


@pytest.fixture
def hub(serve, tmp_path, monkeypatch):
    """Torchvision's resnet50 weights on a server at 127.0.0.1, and an empty cache; the function puts files there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    served = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            content = served.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *arguments):
            pass

    address = serve(Handler)

    def put(content, name):
        if content is not None:
            served[f"/{name}"] = content
        url = f"{address}/{name}"
        monkeypatch.setattr(ResNet50_Weights.IMAGENET1K_V1.value, "url", url)
        return tmp_path / "home" / "hub" / "checkpoints" / name

    return put


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def test_torchvisions_weights_are_downloaded_once_and_checked(hub):
    state = {"conv1.weight": torch.arange(3.0)}
    content = saved(state)
    cached = hub(content, f"resnet50-{hashlib.sha256(content).hexdigest()[:8]}.pth")
    assert torch.equal(read_weights("IMAGENET1K_V1", "resnet50")["conv1.weight"], state["conv1.weight"])
    hub(b"changed on the server", cached.name)
    assert torch.equal(read_weights("IMAGENET1K_V1", "resnet50")["conv1.weight"], state["conv1.weight"])
    cached.write_bytes(content[:100])
    with pytest.raises(OSError, match=rf"{cached.name} is damaged .*Delete it to download it again"):
        read_weights("IMAGENET1K_V1", "resnet50")


def test_failed_downloads(hub):
    cached = hub(saved({"conv1.weight": torch.zeros(1)}), "resnet50-00000000.pth")
    with pytest.raises(
        OSError, match=r"resnet50-00000000\.pth could not be downloaded \(invalid hash value"
    ) as refused:
        read_weights("IMAGENET1K_V1", "resnet50")
    assert f"put it into {cached.parent} (TORCH_HOME sets that folder)" in str(refused.value)
    assert not cached.exists()
    hub(None, "resnet50-11111111.pth")
    with pytest.raises(OSError, match=r"weights='IMAGENET1K_V1': http.*could not be downloaded \(HTTP Error 404"):
        read_weights("IMAGENET1K_V1", "resnet50")
