"""DVPT: zero gates change nothing, prompts follow the image, bottlenecks are shared and not copied, files hold them once."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.test_tokens import FAMILIES, close, images, make
from vitkit import tokens
from vitkit.adapt import dvpt
from vitkit.errors import ConfigError
from vitkit.settings import Classify, Task

TASK = Task("single", ("a", "b", "c"))
SIZE = (64, 96)


def adapted(family: str = "plain", *, seed: int = 0, **settings) -> torch.nn.Module:
    vit = make(family)
    torch.manual_seed(seed)
    return dvpt.inject(vit, dvpt.Settings(**{"prompts": 4, "bottleneck": 6, "share_every": 2, **settings})).eval()


@pytest.mark.parametrize("variant", ["dynamic", "released"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_agrees_with_timms_own_forward(family, variant):
    vit, x = adapted(family, variant=variant, gate_init=0.5), images(SIZE)
    with torch.no_grad():
        found = tokens.encode(vit, x)
        assert found.prompts.shape == (2, 4, vit.embed_dim)
        assert found.map.shape == (2, vit.embed_dim, 4, 6)
        assert torch.equal(found.all, vit.forward_features(x))
        assert close(tokens.logits(vit, x), vit(x), 1e-6)
        half = tokens.encode(vit, x, keep=torch.arange(12).expand(2, -1))
    assert half.patches.shape[1] == 12 and half.prompts.shape[1] == 4


@pytest.mark.parametrize("variant", ["dynamic", "released"])
def test_gate_zero_and_no_prompts_is_the_frozen_model(variant):
    """With zero gates the blocks are the trunk's: the same numbers as a trunk that is given the prompts as tokens, and,
    where nothing can look at the prompts, as the trunk alone."""
    vit, plain, x = adapted(variant=variant), make("plain"), images(SIZE)
    with torch.no_grad():
        stream = tokens.embed(vit, x)
        ours = tokens.run(vit, stream)
        assert torch.equal(ours.x, tokens.run(plain, stream).x)
        alone = tokens.embed(plain, x)
        assert torch.equal(
            tokens.run(plain, tokens.Stream(stream.x[:, 4:], None, stream.grid)).x, tokens.run(plain, alone).x
        )


@pytest.mark.parametrize("variant", ["dynamic", "released"])
def test_a_zero_gate_moves_first(variant):
    method = dvpt.DVPT(make("plain"), dvpt.Settings(variant=variant, prompts=4, bottleneck=6), task=TASK)
    torch.nn.init.normal_(method.vit.head.weight)
    method({"image": images((64, 64), 3), "label": torch.arange(3)})["loss"].backward()
    for bottleneck in method.vit.prompt_proj:
        assert bottleneck.prompt_gate.grad.abs().sum() > 0
        for layer in (bottleneck.prompt_key_proj_d, bottleneck.prompt_key_proj_u):
            assert not layer.weight.grad.any() and not layer.bias.grad.any()


def gains(vit, x) -> torch.Tensor:
    """What the first block's bottleneck adds to the prompts, its input being the embedded tokens themselves."""
    return vit.blocks[0].gain(x)[:, :4]


def test_dynamic_prompts_follow_the_patches_in_content_and_not_in_order():
    vit = adapted(gate_init=0.5)
    with torch.no_grad():
        x = tokens.embed(vit, images(SIZE)).x
        assert not close(gains(vit, x[:1]), gains(vit, x[1:]), 1e-3)  # two images, the same prompts
        order = torch.cat([torch.arange(5), 5 + torch.randperm(x.shape[1] - 5)])
        assert close(gains(vit, x[:, order]), gains(vit, x), 1e-5)
        other = x.clone()
        other[:, 5:] = other[:, 5:] * 2 + 1
        assert not close(gains(vit, other), gains(vit, x), 1e-3)
        cls = x.clone()
        cls[:, 4] += 1  # the class token is not among the keys
        assert torch.equal(gains(vit, cls), gains(vit, x))


def test_released_prompts_change_through_self_attention_alone():
    vit = adapted(variant="released", gate_init=0.5)
    with torch.no_grad():
        x = tokens.embed(vit, images(SIZE)).x
        assert torch.equal(gains(vit, x[:1]), gains(vit, x[1:]))
        ends = tokens.encode(vit, images(SIZE)).prompts
        assert not close(ends[:1], ends[1:], 1e-3)


@pytest.mark.parametrize("share_every", [1, 2, 3, 5])
def test_sharing_gives_few_bottlenecks_whose_gradients_add_up(share_every):
    vit = adapted(share_every=share_every, gate_init=0.5)
    depth = len(vit.blocks)
    assert len(vit.prompt_proj) == math.ceil(depth / share_every)
    assert [id(b.dvpt[0]) for b in vit.blocks] == [id(vit.prompt_proj[i // share_every]) for i in range(depth)]
    apart = copy.deepcopy(vit)
    for block in apart.blocks:  # the same numbers with a bottleneck of its own in every block
        block.dvpt = (copy.deepcopy(block.dvpt[0]), *block.dvpt[1:])
    x = images(SIZE)
    tokens.encode(vit, x).all.square().sum().backward()
    tokens.encode(apart, x).all.square().sum().backward()
    for group, bottleneck in enumerate(vit.prompt_proj):
        for name, parameter in bottleneck.named_parameters():
            each = [
                dict(b.dvpt[0].named_parameters())[name].grad
                for b in list(apart.blocks)[group * share_every :][:share_every]
            ]
            assert close(parameter.grad, torch.stack(each).sum(0), 1e-5), name


def test_copies_keep_the_sharing_and_files_hold_one_copy(tmp_path):
    from vitkit.parts.statefiles import read_state, save_state

    vit, x = adapted(gate_init=0.5), images(SIZE)
    twin = copy.deepcopy(vit)
    assert all(b.dvpt[0] is twin.prompt_proj[i // 2] for i, b in enumerate(twin.blocks))
    assert twin.prompt_proj[0] is not vit.prompt_proj[0]
    with torch.no_grad():
        want = tokens.logits(vit, x)
        assert torch.equal(tokens.logits(twin, x), want)
        trained = {name: value for name, value in vit.state_dict().items() if dvpt.trains(name)}
        assert len(trained) == 2 + 2 * 5 and len({v.data_ptr() for v in trained.values()}) == len(trained)
        save_state(tmp_path / "delta.safetensors", trained)
        again = adapted(seed=1)
        assert not torch.equal(tokens.logits(again, x), want)
        again.load_state_dict(read_state(tmp_path / "delta.safetensors")[0], strict=False)
        assert torch.equal(tokens.logits(again, x), want)


def test_the_head_reads_prompts_and_the_models_own_feature():
    for family in ("plain", "avg_fc_norm", "siglip", "no_class_token", "deit_distilled"):
        plain, vit, x = make(family), adapted(family), images(SIZE)
        with torch.no_grad():
            found = tokens.encode(vit, x).all
            prompts, rest = found[:, :4], found[:, 4:]
            if family == "avg_fc_norm":  # its norm comes after pooling
                own = plain.pool(rest)
                want = plain.fc_norm((prompts.sum(1) + own) / 5)
            else:
                want = (prompts.sum(1) + plain.forward_head(rest, pre_logits=True)) / 5
            assert close(tokens.feature(vit, x), want, 1e-6), family


@pytest.mark.parametrize("variant", ["dynamic", "released"])
def test_scores_are_the_same_without_the_rows_that_the_head_does_not_read(variant):
    """Also where other methods stand on the same blocks, above or below."""
    from vitkit.adapt import adaptformer, vpt

    others = (adaptformer, adaptformer.Settings(bottleneck=4, dropout=0.0)), (vpt, vpt.Settings(prompts=2))
    for family in ("plain", "dinov3", "dinov2_registers", "deit_distilled", "no_class_token"):
        for below, above in (((), ()), (others, ()), ((), others)):
            vit, x = make(family), images(SIZE)
            torch.manual_seed(0)
            for module, settings in below:
                module.inject(vit, settings)
            dvpt.inject(vit, dvpt.Settings(variant=variant, prompts=4, bottleneck=6, gate_init=0.5))
            for module, settings in above:
                module.inject(vit, settings)
            with torch.no_grad():
                for block in vit.blocks:
                    if hasattr(block, "adaptmlp"):
                        block.adaptmlp.up_proj.weight.normal_()
                want = vit.forward_head(tokens.encode(vit, x).all)
                assert close(tokens.logits(vit, x), want, 1e-5) and close(vit(x), want, 1e-5), (family, below, above)


@pytest.mark.parametrize("variant", ["dynamic", "released"])
@pytest.mark.parametrize("family", ["plain", "dinov3", "deit_distilled", "siglip"])
def test_class_prompts_above_and_below_leave_the_right_rows_to_each(family, variant):
    """Prompt-CAM's class prompts run in front of DVPT's; DVPT's block and head must still find their own."""
    from vitkit.explain import prompt_cam
    from vitkit.parts.heads import install_head

    x, own = images(SIZE), dvpt.Settings(variant=variant, prompts=4, bottleneck=6, gate_init=0.5)
    classes = prompt_cam.Settings(prompts=3, start=1, prompt_dropout=0.0)
    for order in ("below", "above"):
        vit = make(family)
        torch.manual_seed(0)
        if order == "below":
            dvpt.inject(prompt_cam.inject(vit, classes), own)
        else:
            prompt_cam.inject(dvpt.inject(vit, own), classes)
        install_head(vit, "linear", 3, std=0.1)
        with torch.no_grad():
            found = tokens.encode(vit, x).all
            stream = tokens.embed(vit, x)
            assert found.shape[1] == 3 + 4 + vit.num_prefix_tokens + 24
            assert close(tokens.logits(vit, x), vit(x), 1e-5)
            prompts, rest = found[:, 3:7], make(family).forward_head(found[:, 7:], pre_logits=True)
            assert close(tokens.feature(vit, x), (prompts.sum(1) + rest) / 5, 1e-5)
            if variant == "dynamic":
                front = torch.cat([torch.randn(2, 3, 48), stream.x], dim=1)
                other = torch.cat([torch.randn(2, 3, 48), stream.x], dim=1)
                assert torch.equal(vit.blocks[1].gain(front)[:, 3:], vit.blocks[1].gain(other)[:, 3:])


def test_new_prompts_have_the_size_of_tokens():
    clip, plain = adapted("clip", prompts=400), adapted("plain", prompts=400)
    assert abs(float(clip.prompt_token.detach().std()) - 1) < 0.05  # `norm_pre` follows
    size = float(plain.pos_embed.detach().std())
    assert abs(float(plain.prompt_token.detach().std()) / size - 1) < 0.05
    assert abs(float(adapted(prompts=400, prompt_std=0.3).prompt_token.detach().std()) - 0.3) < 0.02


def test_a_run_saves_its_delta_and_predicts_the_same_again(tmp_path):
    import vitkit

    settings = {
        "model": "vit_tiny_patch16_224",
        "pretrained": False,
        "data": "digits",
        "patch_size": 4,
        "image_size": 16,
    }
    settings |= {"arch_kwargs": {"embed_dim": 32, "depth": 4, "num_heads": 2}, "labels_per_class": 3, "epochs": 1}
    small = {"prompts": 3, "bottleneck": 4, "gate_init": 0.1, "batch_size": 10, "quiet": True, "workers": 0}
    run = vitkit.adapt("dvpt", **settings, **small, out=tmp_path / "run")
    one, two = (vitkit.load(tmp_path / "run", say=None) for _ in range(2))
    pixels = torch.rand(3, one.vit.patch_embed.proj.weight.shape[1], 16, 16)
    assert isinstance(one.vit, dvpt.PromptedViT) and torch.equal(one(pixels), two(pixels))
    names = {name for name, _ in one.vit.named_parameters() if dvpt.trains(name)}
    assert run.summary["trained_parameters"] == sum(
        p.numel() for n, p in one.vit.named_parameters() if n in names or n.startswith("head.")
    )


def test_torch_compile_of_blocks_gives_the_same_numbers():
    vit, x = adapted(gate_init=0.5), images((64, 64))
    with torch.no_grad():
        want = tokens.encode(vit, x).all
        for block in vit.blocks:
            block.compile(backend="eager", fullgraph=True)
        assert close(tokens.encode(vit, x).all, want, 1e-5)


@pytest.mark.parametrize("name", ["prompts", "bottleneck", "share_every"])
def test_numbers_out_of_range_are_named(name):
    with pytest.raises(ConfigError, match=f"{name} is 0\n  fix: at least 1"):
        dvpt.Settings(**{name: 0})
    with pytest.raises(ConfigError, match="prompt_std is -1"):
        dvpt.Settings(prompt_std=-1.0)


def test_twice_is_refused():
    with pytest.raises(ConfigError, match="already carries DVPT's prompts"):
        dvpt.inject(adapted(), dvpt.Settings())


def test_masks_are_refused_with_the_python_api_named(tmp_path):
    import numpy as np
    from PIL import Image

    import vitkit
    from vitkit.errors import DataError

    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for i in range(6):
            Image.fromarray((np.arange(256, dtype=np.uint8).reshape(16, 16) > 100 + i).astype(np.uint8)).save(
                tmp_path / kind / f"{i}.png"
            )
    with pytest.raises(DataError, match=r"vitkit\.dense\.dvpt_segformer"):
        vitkit.adapt(
            "dvpt", model="vit_tiny_patch16_224", pretrained=False, data=tmp_path, out=tmp_path / "run", quiet=True
        )


def test_official_checkpoints_that_do_not_fit_are_named():
    vit = adapted()
    given = {"prompt_token": vit.prompt_token, "prompt_positional_embedding": vit.prompt_positional_embedding}
    for block, group in ((0, 0), (2, 1)):
        for name, value in vit.prompt_proj[group].state_dict().items():
            given[f"transformer.resblocks.{block}.prompt_proj.{name}"] = value
    again = adapted(seed=1)
    dvpt.load_official(again, given)
    assert torch.equal(again.prompt_token, vit.prompt_token)
    copied = {n.replace("blocks.0.", "blocks.1."): v for n, v in given.items() if "blocks.0." in n}
    dvpt.load_official(again, given | copied)  # stored under every block that shares it
    with pytest.raises(ConfigError, match="differs in blocks that would share it"):
        dvpt.load_official(again, given | {n: v + 1 for n, v in copied.items()})
    with pytest.raises(ConfigError, match="has no prompt_token"):
        dvpt.load_official(again, {})
    with pytest.raises(ConfigError, match=r"prompt_token is \(1, 4, 48\) in the file and \(1, 7, 48\) here"):
        dvpt.load_official(adapted(prompts=7), given | {"prompt_positional_embedding": torch.zeros(7, 48)})
    far = {"transformer.resblocks.9.prompt_proj.prompt_gate": torch.zeros(1)}
    with pytest.raises(ConfigError, match="a block that this ViT has not"):
        dvpt.load_official(again, given | far)


def test_released_rates_come_an_epoch_late():
    rates = [dvpt.released_rate(e, lr=5.0, warmup=5, epochs=60) for e in range(8)]
    assert rates[:7] == [5.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and rates[7] < 5.0
    assert Classify().head == "linear"


@pytest.mark.parametrize("name,word", [("variant", "code"), ("activation", "silu"), ("prompt_std", "small")])
def test_words_that_are_no_choice_are_named(name, word):
    """Made in Python, where nothing else checks them: `variant="code"` must not quietly be the released one."""
    with pytest.raises(ConfigError, match=f"{name} is '{word}'\\n  fix: one of: "):
        dvpt.Settings(**{name: word})
