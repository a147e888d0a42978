"""`space`, the question: every law reached by name, arguments that do not belong refused by name."""

import json

import pytest

from kvfloor import floors
from kvfloor.floors import standard
from kvfloor.floors.metric import NORMS


def test_every_attention_reaches_its_law():
    assert floors.space(512, 64) == standard.space(512, 64)
    assert floors.space(512, 64, attention="window", window=64) == standard.space(512, 64, window=64)
    assert floors.space(512, 64, window=64) == standard.space(512, 64, window=64)
    assert floors.space(512, 64, radius=8.0, eta=0.1, p=0.8, heads=2, layers=3) == standard.space(
        512, 64, radius=8.0, eta=0.1, p=0.8, heads=2, layers=3
    )
    assert floors.space(64, 64, 8, attention="tensor", eta=0.1) == floors.tensor_space(64, 64, 8, eta=0.1)
    assert floors.space(64, 64, attention="tensor", caches=2, radius=9.0) == floors.tensor_space(
        64, 64, caches=2, radius=9.0
    )
    assert floors.space(16, 64, attention="visual", p=0.8) == floors.visual_space(16, 64, p=0.8)
    assert floors.space(27, 64, attention="visual", ratio=3.0) == floors.visual_space(27, 64, ratio=3.0)


def test_the_additive_metric_and_the_number_format_reach_their_law():
    asked = {"epsilon": 0.1, "radius": 20.0, "p": 0.8, "heads": 2, "values": "bf16"}
    assert floors.space(512, 64, 32, metric="additive", **asked) == floors.additive_space(512, 64, 32, **asked)
    assert floors.space(512, 64, values="bf16") == standard.space(512, 64, values="bf16")
    assert floors.space(64, 64, attention="tensor", values="bf16") == floors.tensor_space(64, 64, values="bf16")
    assert floors.space(16, 64, attention="visual", values="bf16") == floors.visual_space(16, 64, values="bf16")
    fine = {"metric": "max", "epsilon": 0.1, "values": "fp32"}
    assert floors.space(512, 64, **fine) == floors.metric_space(512, 64, **fine)


@pytest.mark.parametrize("metric", NORMS)
def test_every_metric_reaches_its_law(metric):
    asked = {"metric": metric, "epsilon": 0.1, "radius": 20.0, "p": 0.8, "heads": 2, "layers": 3}
    assert floors.space(512, 64, 32, **asked) == floors.metric_space(512, 64, 32, **asked)
    windowed = floors.space(512, 64, attention="window", window=64, metric=metric, epsilon=0.1)
    assert windowed == floors.metric_space(512, 64, window=64, metric=metric, epsilon=0.1)


@pytest.mark.parametrize(
    "asked",
    [
        {}, {"window": 64}, {"radius": 4.0}, {"attention": "tensor"}, {"attention": "visual"},
        {"metric": "operator", "epsilon": 0.2, "radius": 2.0}, {"metric": "max", "epsilon": 1.0},
        {"metric": "additive", "epsilon": 0.1}, {"metric": "additive", "epsilon": 1.0}, {"values": "binary"},
    ],
)  # fmt: skip
def test_every_answer_is_strict_json_with_the_same_keys(asked):
    told = floors.space(100, 8, **asked).as_dict()
    assert list(told) == ["bits", "bytes", "upper_bits", "regime", "theorem", "constants", "possible"]
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    for memory in told["possible"]:
        assert list(memory) == ["name", "bits", "bytes", "ratio", "vacuous", "condition", "source"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"attention": "cube"}, "attention must be one of standard, window, tensor, visual, got 'cube'"),
        ({"metric": "l1"}, "metric must be one of entrywise, max, frobenius, operator, additive, got 'l1'"),
        ({"attention": "window"}, "attention='window' needs window"),
        ({"attention": "tensor", "window": 4}, "window belongs to attention standard or window, got window=4"),
        ({"attention": "visual", "radius": 4.0}, "radius belongs to attention standard or window or tensor"),
        ({"values": "int8"}, "values must be one of fp16, bf16, fp32, binary, got 'int8'"),
        ({"caches": 2}, "caches belongs to attention tensor, got caches=2 with 'standard'"),
        ({"attention": "tensor", "ratio": 2.0}, "ratio belongs to attention visual, got ratio=2.0 with 'tensor'"),
        ({"metric": "max"}, "metric='max' needs epsilon"),
        ({"epsilon": 0.1}, "epsilon belongs to the metrics max, frobenius, operator, additive"),
        ({"attention": "tensor", "metric": "max", "epsilon": 0.1}, "metric must be entrywise with attention='tensor'"),
        ({"attention": "visual", "metric": "max", "epsilon": 0.1}, "metric must be entrywise with attention='visual'"),
    ],
)
def test_refusals_name_the_argument(asked, message):
    with pytest.raises(ValueError, match=message):
        floors.space(100, 8, **asked)
