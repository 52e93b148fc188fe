"""Checkpoints of the public code of MoE-Adapters: every name both ways, the numbers that they compute, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from public_block import BOTTLENECK, EXPERTS, coders, public_block, public_checkpoint
from small_clip import LAYERS, QUICK, build, copied
from torch import Tensor

from cl_methods.backbone import load_backbone
from cl_methods.cli import main
from cl_methods.components.adapters import residual_blocks
from cl_methods.training.export import Adapter, load_adapter, read_adapter, write_adapter
from cl_methods.weights import moe_adapters4cl, read_weights

BACKBONE_DDAS = {"ddas": {"features": "backbone", "code": 4, "threshold": 1e9}}


@pytest.fixture(scope="module")
def clip() -> dict[str, Tensor]:
    return copied(build(QUICK))


@pytest.fixture(scope="module")
def checkpoint(clip: dict[str, Tensor]) -> dict[str, Tensor]:
    return public_checkpoint(clip)


@pytest.mark.parametrize("shared", [False, True])
def test_every_name_both_ways(clip: dict[str, Tensor], shared: bool) -> None:
    theirs = public_checkpoint(clip, shared=shared)
    found = moe_adapters4cl.from_public(theirs)
    assert found.clip.keys() == clip.keys()
    assert found.settings == {
        "experts": EXPERTS,
        "bottleneck": BOTTLENECK,
        "text_adapters": True,
        "routers": "shared" if shared else "task",
    }
    assert found.tasks == (1 if shared else 3)
    again = moe_adapters4cl.to_public(found.clip, found.adapters, shared=shared)
    assert again.keys() == theirs.keys()
    for name, value in again.items():
        assert torch.equal(value, theirs[name]), name


def test_frozen_experts_both_ways(checkpoint: dict[str, Tensor]) -> None:
    lines = [
        f"{tower}transformer.resblocks.1.adaptmlp_list.{expert}.{side}_proj.{kind}"
        for tower, expert in (("visual.", 2), ("", 4))
        for side in ("down", "up")
        for kind in ("weight", "bias")
    ]
    found = moe_adapters4cl.from_public(checkpoint, lines + lines[:3] + [""])
    frozen = {name: value.nonzero().flatten().tolist() for name, value in found.adapters.items() if "frozen" in name}
    assert frozen["blocks.visual_1.frozen"] == [2]
    assert frozen["blocks.text_1.frozen"] == [4]
    assert frozen["blocks.visual_0.frozen"] == []
    assert sorted(moe_adapters4cl.frozen_lines(found.adapters)) == sorted(lines)
    with pytest.raises(
        ValueError, match=r"frozen: 'visual.transformer.resblocks.1.ln_1.weight' is no tensor of an expert"
    ):
        moe_adapters4cl.from_public(checkpoint, ["visual.transformer.resblocks.1.ln_1.weight"])


def test_autoencoders_both_ways() -> None:
    theirs = coders(width=6)
    ours = moe_adapters4cl.detector_from_public(theirs, tasks=2)
    assert torch.equal(ours["generic.encoder.weight"], theirs["0.encoder.0.weight"])
    assert torch.equal(ours["tasks.1.decoder.bias"], theirs["2.decoder.0.bias"])
    again = moe_adapters4cl.detector_to_public(ours)
    assert again.keys() == {name for name in theirs if int(name.split(".")[0]) < 3}
    assert all(torch.equal(value, theirs[name]) for name, value in again.items())
    with pytest.raises(ValueError, match=r"12 tasks need 13 autoencoders, missing are 12\.encoder\.0\.weight"):
        moe_adapters4cl.detector_from_public(theirs, tasks=12)
    with pytest.raises(ValueError, match="needs an autoencoder of generic data"):
        moe_adapters4cl.detector_to_public({name: v for name, v in ours.items() if not name.startswith("generic")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.transformer.resblocks.1.router_list.0": None}, r"visual_1 .*missing: router_list\.0"),
        (
            {"transformer.resblocks.0.adaptmlp_list.0.up_proj.bias": None},
            r"text_0 .*missing: adaptmlp_list\.0\.up_proj\.bias",
        ),
        ({"transformer.resblocks.0.adaptmlp_list.0.gate": torch.ones(1)}, r"text_0 .*unknown: adaptmlp_list\.0\.gate"),
        (
            {"transformer.resblocks.0.adaptmlp.up_proj.bias": torch.ones(64)},
            "holds its last expert twice, with different",
        ),
    ],
)
def test_names_that_do_not_fit_are_listed(
    checkpoint: dict[str, Tensor], change: dict[str, Tensor | None], message: str
) -> None:
    state = {**checkpoint, **change}
    with pytest.raises(ValueError, match=message):
        moe_adapters4cl.from_public({name: value for name, value in state.items() if value is not None})


def test_a_block_without_adapters_is_named(checkpoint: dict[str, Tensor]) -> None:
    place = "visual.transformer.resblocks.1."
    lacking = {
        name: v
        for name, v in checkpoint.items()
        if not name.startswith((f"{place}adapt", f"{place}rout", f"{place}w_n"))
    }
    with pytest.raises(ValueError, match="adapters in every residual block, none are in visual_1"):
        moe_adapters4cl.from_public(lacking)


def test_a_plain_model_refuses_it_and_the_command_makes_an_adapter_file(
    checkpoint: dict[str, Tensor], clip: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, detector, plain = tmp_path / "SUN397.pth", tmp_path / "SUN397_autochooser.pth", tmp_path / "clip.pt"
    torch.save({"state_dict": checkpoint}, file)
    torch.save({"state_dict": coders(width=256)}, detector)
    torch.save(clip, plain)
    with pytest.raises(ValueError, match=r"holds adapters of MoE-Adapters4CL besides CLIP.*clk export"):
        load_backbone(QUICK, str(file))
    arguments = ["export", str(file), "--model", QUICK, "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "give it with --detector" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, detector.name, plain.name]
    assert main([*arguments, "--detector", str(plain)]) == 2
    assert f"detector: {plain}: expected autoencoders" in capsys.readouterr().err
    assert main([*arguments, "--detector", str(detector)]) == 0
    assert "load_adapter" in capsys.readouterr().out
    method = load_adapter(tmp_path / "out", backbone=load_backbone(QUICK, str(plain)), settings=BACKBONE_DDAS)
    assert len(method.detector.tasks) == 3
    _check_numbers(method, checkpoint)

    assert main(["export", str(tmp_path / "out"), "--pretrained", str(plain), "--output", str(tmp_path / "back"),
                 "--layout", "moe-adapters4cl"]) == 0  # fmt: skip
    again = read_weights(tmp_path / "back" / "model.pth").state
    assert again.keys() == checkpoint.keys()
    assert all(torch.equal(value, checkpoint[name]) for name, value in again.items())
    chooser = read_weights(tmp_path / "back" / "model_autochooser.pth").state
    assert all(torch.equal(value, coders(width=256)[name]) for name, value in chooser.items())

    torch.save({name: value + 0.1 if value.ndim > 1 else value for name, value in clip.items()}, plain)
    with pytest.raises(ValueError, match="were trained on weights with fingerprint"):
        load_adapter(tmp_path / "out", backbone=load_backbone(QUICK, str(plain)), settings=BACKBONE_DDAS)


@torch.no_grad()
def _check_numbers(method, checkpoint: dict[str, Tensor]) -> None:
    """Every mounted block against the formula of the public one, on the tensors as the checkpoint has them."""
    backbone = method.backbone
    for tower, prefix, module in (("visual", "visual.", backbone.model.visual), ("text", "", backbone.text_tower)):
        for index in range(LAYERS):
            block = module.transformer.resblocks[index]
            width, heads = block.attn.embed_dim, block.attn.num_heads
            x, mask = torch.randn(6, 5, width), None if tower == "visual" else backbone.text_tower.attn_mask[:5, :5]
            for router in range(3):
                with method.adapters.active(router):
                    ours = block(x, attn_mask=mask)
                base = f"{prefix}transformer.resblocks.{index}."
                expected = public_block(x, checkpoint, base, f"router_list.{router}", heads, mask)
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="already carries adapters"):
        residual_blocks(backbone, text=True)


def test_an_adapter_file_names_what_it_lacks(checkpoint: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no adapter file: expected adapter_model\.safetensors"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    (tmp_path / "adapter_config.json").write_text('{"format": "cl_methods adapter", "version": 2}')
    with pytest.raises(ValueError, match="version 2 is not known here; expected 1"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        '{"format": "cl_methods adapter", "version": 1, "method": "x", "y": 1}'
    )
    (tmp_path / "whole").mkdir()
    adapter = Adapter("zero_shot", {}, "mini", None, None, 0, [], "nothing")
    write_adapter(tmp_path / "whole", adapter, {"a": torch.zeros(9)})
    assert read_adapter(tmp_path / "whole")[0] == adapter
    file = tmp_path / "whole" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a complete safetensors file"):
        read_adapter(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"missing or unknown are base_fingerprint, model, .*, y"):
        read_adapter(tmp_path)
