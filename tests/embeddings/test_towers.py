"""A surfaced model calls its towers: hooks fire, FSDP2 shards them, a compiled one is used, restoring undoes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from ranks import run_ranks
from sharded_towers import sharded_step, surfaced_step
from tiny_models import VISION, ToyTokenizer, captions, clip, coca, custom_text_clip, hf_clip, images_for
from torch import nn
from torch.testing import assert_close

from sparc_loss import restore, surface_embeddings

WITH_TEXT_TOWER = {"CustomTextCLIP": lambda _: custom_text_clip(), "HF": hf_clip, "CoCa": lambda _: coca()}


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("vision", VISION)
def test_hooks_of_the_image_tower_fire_once_with_the_pooled_feature_first(vision):
    model = surface_embeddings(clip(vision), ToyTokenizer())
    before, after = [], []
    model.visual.register_forward_pre_hook(lambda module, inputs: before.append(inputs))
    model.visual.register_forward_hook(lambda module, inputs, output: after.append(output))
    output = model.train()(images_for(model), captions())
    assert len(before) == len(after) == 1
    pooled = first(after[0][0])
    assert torch.equal(torch.nn.functional.normalize(pooled, dim=-1), output["image_features"])
    model.eval().encode_image(images_for(model))
    assert len(after) == 2
    assert isinstance(first(after[1]), torch.Tensor)


@pytest.mark.parametrize("name", WITH_TEXT_TOWER)
def test_hooks_of_the_text_tower_fire_once_with_the_pooled_feature_first(name, tmp_path):
    model = surface_embeddings(WITH_TEXT_TOWER[name](tmp_path), ToyTokenizer())
    after = []
    model.text.register_forward_hook(lambda module, inputs, output: after.append(output))
    output = model.train()(images_for(model), captions())
    assert len(after) == 1
    assert torch.equal(torch.nn.functional.normalize(first(after[0][0]), dim=-1), output["text_features"])


def test_a_compiled_tower_is_used():
    model = surface_embeddings(clip(), ToyTokenizer()).train()
    expected = model(images_for(model), captions())
    calls = []

    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward

    model.visual.compile(backend=backend)
    found = model(images_for(model), captions())
    assert calls
    assert_close(found["patch_features"], expected["patch_features"])


@pytest.mark.slow
@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="FSDP2 on the CPU needs a torch newer than 2.6"
)
def test_towers_sharded_by_fsdp2_give_the_gradient_of_one_process(tmp_path):
    expected = surfaced_step()
    results = run_ranks(sharded_step, 2, tmp_path)
    assert expected.pop("said") == "CustomTextCLIP"
    assert_close(sum(result["loss"] for result in results) / 2, expected.pop("loss"), rtol=1e-10, atol=1e-10)
    for name, gradient in expected.items():
        for result in results:
            assert_close(result[name], gradient, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    message = "model has the class FSDPSurfacedCustomTextCLIP, made of a surfaced one since (as fully_shard makes one)"
    assert all(result["said"].startswith(message) for result in results)


@pytest.mark.parametrize("name", ["CLIP", *WITH_TEXT_TOWER])
def test_restoring_gives_the_towers_their_own_classes(name, tmp_path):
    plain = clip() if name == "CLIP" else WITH_TEXT_TOWER[name](tmp_path)
    classes = [type(module) for module in plain.modules()]
    model = surface_embeddings(surface_embeddings(plain, ToyTokenizer()), ToyTokenizer())
    assert isinstance(model.visual, classes[[type(module) for module in plain.modules()].index(type(model.visual))])
    assert [type(module) for module in restore(model).modules()] == classes


def test_a_model_of_a_class_made_of_a_surfaced_one_is_not_restored():
    model = surface_embeddings(clip(), ToyTokenizer())
    model.__class__ = type("Mine", (type(model),), {})
    with pytest.raises(TypeError, match="model has the class Mine, made of a surfaced one since"):
        restore(model)
    assert hasattr(model, "encode_patches")


@pytest.mark.slow
def test_a_surfaced_model_is_read_in_another_process(tmp_path):
    model = surface_embeddings(clip(), ToyTokenizer()).train()
    inputs = images_for(model), captions()
    torch.save((model, inputs, model(*inputs)["patch_features"]), tmp_path / "model.pt")
    script = "model, inputs, expected = torch.load('model.pt', weights_only=False)\n"
    script += "assert torch.equal(model(*inputs)['patch_features'], expected)"
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    command = [sys.executable, "-c", f"import torch\n{script}"]
    finished = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert finished.returncode == 0, finished.stderr.decode()


def test_a_model_deep_in_a_wrapper_is_refused_with_the_order():
    wrapped = nn.Sequential(nn.ModuleDict({"base_model": nn.Sequential(clip())}))
    with pytest.raises(TypeError, match=r"model is a Sequential; .*; surface the model before it is wrapped"):
        surface_embeddings(wrapped, ToyTokenizer())
