"""``clk profile``: what a newcomer types, what it leaves behind, and what it says when something does not fit."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import pytest
import torch

from cl_kernels.profile import costs, record_step
from cl_kernels.profile.static import comparable_attention
from cl_methods.cli import main
from cl_methods.methods import METHODS
from cl_methods.profiling.steps import Step, workloads

FILES = {"profile.html", "profile.json", "profile.csv", "trace.json", "waterfall.png", "layers.png", "memory.png"}


def test_vit_b_16_from_shapes():
    """35.1 GFLOP per image, and what 2 of 22 experts of width 64 add to the tower, by hand."""
    images = 2
    base, adapted, _ = workloads(Step("ViT-B-16", "moe_adapters", images, 2, "meta", {}))
    with comparable_attention():
        frozen = costs([record_step(base)], base.modules)
        found = costs([record_step(replace(adapted, update=None))], adapted.modules)
    tokens, width, patches = 197, 768, 196
    block = 24 * tokens * width**2 + 4 * tokens**2 * width  # 12 width² weights; scores, and their sums of values
    image = 12 * block + 2 * patches * (3 * 16 * 16) * width  # and the patches
    adapters = 12 * (2 * (4 * tokens * width * 64) + 2 * (2 * width * 22))  # 2 experts; the router and its noise
    assert frozen["visual"].flops_forward == images * (image + 2 * width * 512)
    assert found["visual"].flops_forward == images * (image + 2 * width * 512 + adapters)
    assert round(image / 1e9, 1) == 35.1
    assert 100 * adapters / image == pytest.approx(2.6, abs=0.05)
    # Layer norms 2, queries keys and values 3 (product, bias, apart), attention, projection, MLP 3, sums 2: GELU is one operation.
    assert frozen["visual.transformer.resblocks.5"].operations_forward == 12
    # An adapted block takes queries, keys and values from one product with its bias, leaves the last sum to the kernel of its
    # adapters, and adds 4: noise, a seed, router and adapters, counts.
    assert found["visual.transformer.resblocks.5"].operations_forward == 12 - 2 - 1 + 4
    experts = [22 * (2 * d * 64 + d + 64) + 2 * d * 22 for d in (width, 512)]
    assert found[""].trainable == 12 * sum(experts)
    assert found[""].waits == 0
    assert frozen[""].flops_backward == frozen[""].bytes_saved == 0


def test_the_command_without_weights(tmp_path, capsys):
    assert main(["profile", "--model", "mini", "--static", "--output", str(tmp_path), "--setting", "experts=3"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["subject"] == "moe_adapters (E = 3, k = 2, r = 64) on mini"
    assert found["samples"] == 64
    assert found["seconds"] == {}
    assert found["trust"] is None
    blocks = sum(row["mounted"] for row in found["layers"])
    assert blocks == 5
    assert found["totals"]["eager"]["waits"] == 3 * blocks  # one nonzero for each expert
    assert found["totals"]["adapted"]["waits"] == 0
    assert found["totals"]["eager"]["flops_forward"] == found["totals"]["adapted"]["flops_forward"]
    others = [row["adapted"] for row in found["layers"] if row["mounted"] or row["name"].startswith("(")]
    beside, whole = (sum(cost["flops_forward"] + cost["flops_backward"] for cost in costs) for costs in
                     (others, [found["totals"]["adapted"]]))  # fmt: skip
    assert found["own_share"] == {"flops": pytest.approx(1 - beside / whole, abs=1e-9), "seconds": None}
    assert 0.7 < found["own_share"]["flops"] < 1
    printed = " ".join(capsys.readouterr().out.split())
    assert " ".join(found["headline"].split()) in printed
    assert "visual.transformer.resblocks.1" in printed


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.trains and not method.closed_form])
def test_every_method_that_trains_has_a_step_of_shapes(name):
    base, adapted, method = workloads(Step("mini", name, 4, 3, "meta", {}))
    assert adapted.device == torch.device("meta")
    base.run()
    adapted.run()
    trained = [value for _, value in method.trainable()]
    assert any(value.grad is not None for value in trained)


def test_a_measured_profile_of_mini(tmp_path):
    assert main(["profile", "--model", "mini", "--method", "diki", "--output", str(tmp_path), "--batch-size", "4",
                 "--classes", "3", "--repeats", "2", "--no-compile"]) == 0  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"roofline.png"}
    found = json.loads((tmp_path / "profile.json").read_text())
    assert set(found["seconds"]) == {"frozen", "eager", "fused"}
    assert isinstance(found["trust"]["trustworthy"], bool)
    assert found["trust"]["trustworthy"] == (not found["trust"]["reasons"])
    assert ("not to be trusted" in found["headline"]) == bool(found["trust"]["reasons"])
    rows = list(csv.DictReader((tmp_path / "profile.csv").open()))
    assert all(float(row["seconds_forward_median"]) > 0 for row in rows if int(row["operations_forward"]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "ranpac"], "method: ranpac has no training step to profile: it is solved in closed form"),
        (["--method", "zero_shot"], "method: zero_shot has no training step to profile: it never trains"),
        (["--method", "moe_adapter"], "did you mean moe_adapters?"),
        (["--model", "ViT-Z"], "model: expected 'mini' or one of open_clip.list_models(), got 'ViT-Z'"),
        (["--model", "RN50"], "the visual tower of RN50 has no open_clip residual blocks"),
        (["--batch-size", "0"], "batch_size: expected a number >= 1, got 0"),
        (["--model", "mini", "--classes", "10000"], "classes: expected up to"),
        (["--setting", "experts"], "setting: expected name=value, got 'experts'"),
        (["--setting", "expert=3"], "no setting expert"),
        (["--device", "cpu"], "device: a static profile runs on none"),
        (["--repeats", "0"], "repeats: expected a number >= 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(arguments, message, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["profile", "--static", "--output", str(output), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_file_in_the_way_is_not_replaced(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert main(["profile", "--static", "--output", str(taken)]) == 2
    assert re.search(r"output: expected a directory, got the file", capsys.readouterr().err)
    assert taken.read_text() == "mine"
