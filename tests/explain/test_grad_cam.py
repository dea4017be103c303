"""Grad-CAM equals pytorch-grad-cam's ViT path, for every family, read-out and adaptation."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from tests.test_tokens import FAMILIES, close, images, make
from vitkit import tokens
from vitkit.adapt import vpt
from vitkit.errors import ConfigError
from vitkit.explain import grad_cam
from vitkit.parts.heads import install_head

SIZE = (64, 112)
TARGET = torch.tensor([3, 1])


def reference(vit, x, target, layer=-1):
    """Their map, which they scale to [0, 1] before and after enlarging it to the images' size."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    rows, columns = x.shape[2] // 16, x.shape[3] // 16

    def reshape(tokens_):
        return tokens_[:, -rows * columns :].reshape(len(tokens_), rows, columns, -1).permute(0, 3, 1, 2)

    with GradCAM(vit, [vit.blocks[layer].norm1], reshape_transform=reshape) as cam:
        return cam(x, targets=[ClassifierOutputTarget(int(t)) for t in target])


def enlarged(maps, size):
    from pytorch_grad_cam.utils.image import scale_cam_image

    return scale_cam_image(scale_cam_image(maps.numpy(), size[::-1]))


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_pytorch_grad_cam(name):
    vit, x = make(name), images(SIZE)
    found = grad_cam.saliency(vit, x, TARGET)
    assert found.shape == (2, 4, 7) and (found >= 0).all()
    assert np.abs(enlarged(found, SIZE) - reference(vit, x, TARGET)).max() <= 2e-5


@pytest.mark.parametrize("layer", [0, 1])
def test_an_earlier_layer_equals_it_too(layer):
    vit, x = make("plain"), images(SIZE)
    found = grad_cam.saliency(vit, x, TARGET, grad_cam.Settings(layer=layer))
    assert np.abs(enlarged(found, SIZE) - reference(vit, x, TARGET, layer)).max() <= 2e-5


@pytest.mark.parametrize("method", ["adaptformer", "lora", "bitfit"])
def test_adapted_models_equal_it_too(method):
    module = importlib.import_module(f"vitkit.adapt.{method}")
    vit, x = make("dinov3"), images(SIZE)
    settings = module.Settings() if hasattr(module, "Settings") else None
    module.inject(vit, settings)
    head = install_head(vit, "bn_linear", 4, std=0.5)
    head[0].running_mean.normal_()
    found = grad_cam.saliency(vit.eval(), x, TARGET)
    assert np.abs(enlarged(found, SIZE) - reference(vit, x, TARGET)).max() <= 2e-5


@pytest.mark.parametrize("name", ["plain", "dinov3", "avg_fc_norm"])
def test_learned_keys_take_no_part_in_the_map(name):
    """VPT's prompts pass norm1, too; the gradient is that of the definition, with respect to the patch tokens."""
    vit, x = make(name), images(SIZE)
    vpt.inject(vit, vpt.Settings(prompts=3))
    block, seen = vit.blocks[-1], []
    stream = tokens.run(vit, tokens.embed(vit, x), 0, 2)

    class Cut(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, value):
            out = self.norm(value)
            if value.ndim == 3:
                out.retain_grad()
                seen.append(out)
            return out

    norm, block.norm1 = block.norm1, Cut(block.norm1)
    scores = vit.forward_head(tokens.finish(vit, tokens.run(vit, stream, 2)).all)
    scores[torch.arange(2), TARGET].sum().backward()
    block.norm1 = norm
    value, gradient = seen[0].detach()[:, -28:], seen[0].grad[:, -28:]
    want = (value * gradient.mean(1, keepdim=True)).sum(-1).relu().unflatten(1, (4, 7))
    vit.zero_grad()
    found = grad_cam.saliency(vit, x, TARGET)
    assert close(found, want, 1e-5)
    assert all(parameter.grad is None for parameter in vit.parameters())


def test_the_predicted_class_is_the_default():
    vit, x = make("plain"), images(SIZE)
    with torch.no_grad():
        predicted = tokens.logits(vit, x).argmax(1)
    assert torch.equal(grad_cam.saliency(vit, x), grad_cam.saliency(vit, x, predicted))
    assert not torch.equal(grad_cam.saliency(vit, x), grad_cam.saliency(vit, x, (predicted + 1) % 5))


def test_frozen_models_under_no_grad_are_explained_and_left_alone():
    vit, x = make("plain").train().requires_grad_(False), images(SIZE)
    with torch.no_grad():
        found = grad_cam.saliency(vit, x, TARGET)
    assert not found.requires_grad and found.abs().sum() > 0 and vit.training
    assert not vit.blocks[-1].norm1._forward_hooks


def test_under_inference_mode_and_gradient_checkpointing():
    vit, x = make("plain"), images(SIZE)
    wanted = grad_cam.saliency(vit, x, TARGET)
    with torch.inference_mode():
        assert torch.equal(grad_cam.saliency(vit, images(SIZE), torch.tensor([3, 1])), wanted)
    vit.set_grad_checkpointing(True)
    for layer in (-1, 0):
        found = grad_cam.saliency(vit, x, TARGET, grad_cam.Settings(layer=layer))
        assert torch.equal(found, grad_cam.saliency(make("plain"), x, TARGET, grad_cam.Settings(layer=layer)))
    assert vit.grad_checkpointing


def test_errors_say_what_to_do():
    vit, x = make("plain"), images(SIZE)
    with pytest.raises(ConfigError, match=r"class 5 does not exist\n  fix: the head has 5 classes, 0..4"):
        grad_cam.saliency(vit, x, torch.tensor([0, 5]))
    with pytest.raises(ConfigError, match=r"class -1 does not exist"):
        grad_cam.saliency(vit, x, torch.tensor([0, -1]))
    with pytest.raises(ConfigError, match=r"target of shape \(3,\).* for 2 images"):
        grad_cam.saliency(vit, x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"no classification head.*\n  fix: adapt it first"):
        grad_cam.saliency(make("plain", num_classes=0), x)
