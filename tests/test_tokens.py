"""`tokens.encode` gives timm's own numbers for every family of VisionTransformer and Eva, at any size, in eval and train."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from tests.volumes import volume_vit
from vitkit import tokens
from vitkit.errors import ConfigError, WeightsError

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 5, "patch_drop_rate": 0.0}
FAMILIES = {
    "plain": ("vit_tiny_patch16_224", {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {"patch_size": 16, "img_size": 64}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16, "img_size": 64}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", {}),
    "eva02": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "perception": ("vit_pe_core_tiny_patch16_384", {}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),
    "clip": ("vit_base_patch16_clip_224", {}),
    "siglip": ("vit_base_patch16_siglip_224", {}),
    "no_class_token": ("vit_base_patch16_siglip_gap_224", {}),
    "avg_fc_norm": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
}
SIZES = [(64, 64), (96, 96), (64, 112)]


def make(name: str, size: int = 64, **more) -> torch.nn.Module:
    """A family shrunk to 3 blocks of width 48, with every weight random so that nothing hides behind a zero."""
    arch, kwargs = FAMILIES[name]
    torch.manual_seed(0)
    vit = timm.create_model(arch, **{**SMALL, "img_size": size, "dynamic_img_size": True, **kwargs, **more}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return vit


def images(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_all_tokens_equal_timm_exactly(name, size):
    vit, x = make(name), images(size)
    assert isinstance(vit, VisionTransformer | Eva)
    with torch.no_grad():
        ours = tokens.encode(vit, x)
        assert torch.equal(ours.all, vit.forward_features(x))
        assert torch.equal(tokens.logits(vit, x), vit(x))
        assert torch.equal(tokens.feature(vit, x), vit.forward_head(vit.forward_features(x), pre_logits=True))
    assert ours.grid == (size[0] // 16, size[1] // 16)
    assert ours.prefix.shape[1] == vit.num_prefix_tokens
    assert ours.map.shape == (2, vit.embed_dim, *ours.grid)


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_equal_timm_intermediates(name):
    vit, x = make(name), images((64, 112))
    with torch.no_grad():
        ours = tokens.encode(vit, x, layers=[2, 0, -2])
        theirs = vit.forward_intermediates(x, indices=[0, 1, 2], intermediates_only=True, norm=True)
        raw = tokens.encode(vit, x, layers=[1], norm=False).taps[0]
        theirs_raw = vit.forward_intermediates(x, indices=[1], intermediates_only=True, norm=False)[0]
    for tap, want in zip(ours.taps, (theirs[2], theirs[0], theirs[1]), strict=True):
        assert torch.equal(tap.map, want)
    assert torch.equal(raw.map, theirs_raw)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_kept_subset_equals_full_attention_restricted_to_it(name, size):
    vit, x = make(name), images(size)
    count = (size[0] // 16) * (size[1] // 16)
    keep = torch.stack(
        [torch.randperm(count, generator=torch.Generator().manual_seed(i))[: count // 2] for i in (0, 1)]
    )
    seen = torch.zeros(2, count, dtype=torch.bool).scatter_(1, keep, True)
    seen = torch.cat([torch.ones(2, vit.num_prefix_tokens, dtype=torch.bool), seen], dim=1)
    mask = seen[:, None, None, :].expand(-1, 1, seen.shape[1], -1)
    with torch.no_grad():
        ours = tokens.encode(vit, x, keep=keep)
        full = vit.forward_features(x, attn_mask=mask)
    want = full[:, vit.num_prefix_tokens :].gather(1, keep.unsqueeze(-1).expand(-1, -1, vit.embed_dim))
    assert close(ours.patches, want, 2e-5)
    if vit.num_prefix_tokens:
        assert close(ours.prefix, full[:, : vit.num_prefix_tokens], 2e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_timm(name):
    vit, x = make(name), images((64, 64))
    weights = torch.randn(2, 16 + vit.num_prefix_tokens, vit.embed_dim, generator=torch.Generator().manual_seed(2))
    (vit.forward_features(x) * weights).sum().backward()
    theirs = {n: p.grad.clone() for n, p in vit.named_parameters() if p.grad is not None}
    vit.zero_grad()
    (tokens.encode(vit, x).all * weights).sum().backward()
    ours = {n: p.grad for n, p in vit.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for key, grad in ours.items():
        assert close(grad, theirs[key], 1e-5), key


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_maps_reproduce_the_block(name):
    """softmax weights times values, through the block's own projection, must give the block's attention output."""
    vit, x = make(name), images((64, 112))
    with torch.no_grad():
        weights = tokens.attention_maps(vit, x, layers=[0, -1])
        stream = tokens.run(vit, tokens.embed(vit, x), 0, len(vit.blocks) - 1)
        block, attn = vit.blocks[-1], vit.blocks[-1].attn
        inner = block.norm1(stream.x)
        if getattr(attn, "qkv", None) is None:
            value = attn.v_proj(inner).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        else:
            bias = (
                torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)) if getattr(attn, "q_bias", None) is not None else 0
            )
            value = (attn.qkv(inner) + bias).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)[2]
        out = attn.proj(attn.norm((weights[1] @ value).transpose(1, 2).flatten(2)))
        kwargs = tokens.rope_for(vit, stream.rope, len(vit.blocks) - 1)
        assert close(out, attn(inner, **kwargs), 1e-5)
    assert weights[0].shape == (2, attn.num_heads, stream.x.shape[1], stream.x.shape[1])
    assert torch.allclose(weights[0].sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_halves_make_the_block(name):
    vit, x = make(name), images((64, 64))
    with torch.no_grad():
        stream = tokens.embed(vit, x)
        kwargs = tokens.rope_for(vit, stream.rope, 0)
        block = vit.blocks[0]
        halves = tokens.transform(block, tokens.attend(block, stream.x, **kwargs))
        assert torch.equal(halves, block(stream.x, **kwargs))


def test_mask_tokens_replace_embeddings_before_positions():
    vit, x = make("plain"), images((64, 64))
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 3] = True
    token = torch.randn(48)
    with torch.no_grad():
        ours = tokens.encode(vit, x, mask=mask, mask_token=token).all
        patches = vit.patch_embed(x).flatten(1, 2)
        patches[:, 3] = token
        want = vit.norm(vit.blocks(vit._pos_embed(patches.view(2, 4, 4, 48))))
    assert torch.equal(ours, want)


def test_pos_dropout_acts_on_tokens_not_on_the_table():
    vit, x = make("plain", pos_drop_rate=0.5).train(), images((64, 64))
    torch.manual_seed(3)
    theirs = vit.forward_features(x)
    torch.manual_seed(3)
    assert torch.equal(tokens.encode(vit, x).all, theirs)
    assert vit.pos_drop.training


def test_gradient_checkpointing_gives_the_same_numbers():
    vit, x = make("dinov3"), images((64, 64)).requires_grad_()
    plain = tokens.encode(vit, x).all
    vit.set_grad_checkpointing()
    again = tokens.encode(vit, x).all
    again.sum().backward()
    assert torch.equal(plain, again) and x.grad is not None


def test_volumes_have_a_grid_of_three_axes():
    vit = volume_vit()
    x = torch.randn(2, 1, 8, 16, 16)
    with torch.no_grad():
        ours = tokens.encode(vit, x)
        assert torch.equal(ours.all, vit.forward_features(x))
        half = tokens.encode(vit, x, keep=torch.arange(8).expand(2, -1))
    assert ours.grid == (2, 2, 2) and ours.map.shape == (2, 48, 2, 2, 2)
    assert close(half.all, ours.all, 1e-5)


def test_errors_say_what_to_do():
    vit = make("plain")
    with pytest.raises(ConfigError, match=r"\(60, 64\) is not a multiple of the patch size \(16, 16\)"):
        tokens.encode(vit, images((60, 64)))
    with pytest.raises(ConfigError, match="layer 7 does not exist"):
        tokens.encode(vit, images((64, 64)), layers=[7])
    with pytest.raises(WeightsError, match="ResNet is not a timm VisionTransformer"):
        tokens.encode(timm.create_model("resnet18"), images((64, 64)))
    with pytest.raises(ConfigError, match="patch_drop_rate"):
        tokens.encode(make("plain", patch_drop_rate=0.5), images((64, 64)))
    with pytest.raises(ConfigError, match="no feature map"):
        _ = tokens.encode(vit, images((64, 64)), keep=torch.zeros(2, 1, dtype=torch.long)).map


def test_maps_serve_other_trunks_too():
    vit, x = make("plain"), images((64, 64))
    with torch.no_grad():
        assert torch.equal(tokens.maps(vit, x)[0], tokens.encode(vit, x).map)
        assert tokens.maps(timm.create_model("resnet18").eval(), x)[0].shape == (2, 512, 2, 2)


def learned(count: int = 3, width: int = 48) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_ask_nothing_equal_full_tokens_that_are_dropped(name):
    """Learned tokens as keys only: the numbers of putting them in front of timm's own block and cutting them off."""
    from vitkit.parts.blocks import Steps, add_prefix_tokens, extend, join_keys

    class Keys(Steps):
        def extra_keys(self):
            return join_keys(super().extra_keys(), self.own)

    vit, x = make(name), images((64, 112))
    full = make(name)
    for block in vit.blocks:
        extend(block, Keys)
        block.own = learned()
    with torch.no_grad():
        stream = tokens.embed(full, x)
        y = stream.x
        for index, block in enumerate(full.blocks):
            add_prefix_tokens(full, block, 3)
            y = torch.cat([learned().expand(len(y), -1, -1), y], dim=1)
            y = block(y, **tokens.rope_for(full, stream.rope, index))[:, 3:]
        assert close(full.norm(y), tokens.encode(vit, x).all, 2e-6)
        assert torch.equal(vit.forward_features(x), tokens.encode(vit, x).all)  # timm's own way through the blocks
        maps = tokens.attention_maps(vit, x, layers=[0])[0]
    assert maps.shape[-1] == maps.shape[-2] + 3
    assert torch.allclose(maps.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_some_rows_of_attention_alone(name):
    vit, x = make(name), images((64, 112))
    stream = tokens.embed(vit, x)
    with torch.no_grad():
        for index, block in enumerate(vit.blocks):
            kwargs = tokens.rope_for(vit, stream.rope, index)
            whole = tokens.attend(block, stream.x, **kwargs)
            for rows in (1, vit.num_prefix_tokens + 4):
                assert close(tokens.attend(block, stream.x, queries=rows, **kwargs), whole[:, :rows], 2e-6)
            weights, values = tokens.attention_values(block, stream.x, queries=2, **kwargs)
            assert weights.shape[2:] == (2, stream.x.shape[1]) and values.shape[2] == stream.x.shape[1]
            stream = tokens.run(vit, stream, index, index + 1)


@pytest.mark.parametrize("name", ["plain", "dinov3", "no_class_token", "dinov2_registers", "rope_mixed"])
def test_prompts_that_run_along_are_kept_apart(name):
    from vitkit.parts.blocks import Steps, add_prefix_tokens, extend

    class Front(Steps):
        def entering(self, x):
            return torch.cat([learned().expand(len(x), -1, -1), super().entering(x)], dim=1)

    vit, x = make(name), images((64, 112))
    count = vit.num_prefix_tokens
    extend(vit.blocks[1], Front)
    for block in vit.blocks[1:]:
        add_prefix_tokens(vit, block, 3)
    with torch.no_grad():
        found = tokens.encode(vit, x, layers=[0, 1])
        assert found.taps[0].prompts is None and found.taps[1].prompts.shape == (2, 3, 48)
        assert found.prefix.shape[1] == count and found.patches.shape[1] == 28
        assert torch.equal(found.all, vit.forward_features(x))
        assert tokens.maps(vit, x, layers=2)[1].shape == (2, 48, 4, 7)
        assert tokens.attention_maps(vit, x, layers=[1])[0].shape[-2:] == (3 + count + 28,) * 2
        kept = tokens.encode(vit, x, keep=torch.arange(9).expand(2, -1))
    assert kept.patches.shape[1] == 9 and kept.prompts.shape[1] == 3


def test_differential_attention_takes_learned_keys_too():
    from vitkit.parts.attention import attention, weights

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "img_size": 64, "attn_layer": "diff"}).eval()
    attn, x, own = vit.blocks[0].attn, torch.randn(2, 17, 48), learned()
    with torch.no_grad():
        want = attn(torch.cat([own.expand(2, -1, -1), x], dim=1))[:, 3:]
        assert close(attention(attn, x, extra=own), want, 1e-6)
        assert close(attention(attn, x, extra=own, queries=2), want[:, :2], 1e-6)
    with pytest.raises(WeightsError, match="no single map of weights"):
        weights(attn, x)
