"""Prompt-CAM on every ViT family: the lean forward and the fast ranking give the numbers of the straightforward ones."""

from __future__ import annotations

import copy
import importlib
import itertools
import json

import pytest
import torch

import vitkit
from tests.test_tokens import FAMILIES, close, images, make
from vitkit import tokens, weights
from vitkit.errors import ConfigError, WeightsError
from vitkit.explain import class_heads, prompt_cam
from vitkit.explain.prompt_cam import PromptCAM, Settings, inject, install_scorer, lagging_lr, load_official
from vitkit.parts.heads import install_head
from vitkit.settings import Classify, Task

SIZE = (64, 112)
CLASSES = 5
TARGET = torch.tensor([4, 1])


def carrying(vit, start="last", classes: int = CLASSES):
    """`vit` with class prompts and scorer, away from its tiny initial values so that nothing hides."""
    inject(vit, Settings(start=start, prompts=classes, prompt_dropout=0.0))
    install_scorer(vit)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if prompt_cam.trains(name):
                parameter.normal_(std=0.5)
    return vit.eval()


def straightforward(vit, x, blur: tuple[int, list[int]] | None = None):
    """Scores of a plain absolute-position ViT by the words of the paper: all prompts are full tokens in every block,
    attention is written out; `blur` = (class, heads) zeroes their logits in the last block."""
    count, prefix = len(vit.class_prompts), vit.num_prefix_tokens
    stream = tokens.embed(vit, x).x
    for index, block in enumerate(vit.blocks):
        if index <= vit.class_block:
            prompts = getattr(block, "helper_prompts", getattr(block, "class_prompts", None))
            stream = torch.cat([prompts.expand(len(x), -1, -1), stream[:, -stream.shape[1] :]], dim=1)
        attn, inner = block.attn, block.norm1(stream)
        q, k, v = attn.qkv(inner).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.scale
        if blur is not None and index == len(vit.blocks) - 1:
            scores[:, blur[1], blur[0]] = 0
        stream = stream + block.ls1(attn.proj(attn.norm((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))))
        stream = stream + block.ls2(block.mlp(block.norm2(stream)))
        if index < vit.class_block:
            stream = stream[:, count:]
    assert stream.shape[1] > count + prefix
    return vit.head(vit.fc_norm(vit.norm(stream))[:, :count]).squeeze(-1)


@torch.no_grad()
def brute_force(vit, x, target: int) -> list[int]:
    """Ranking by a full forward for every trial, one image."""
    left, removed = list(range(vit.blocks[-1].attn.num_heads)), []
    while left:
        trials = [float(straightforward(vit, x, (target, [*removed, head]))[0, target]) for head in left]
        removed.append(left.pop(trials.index(max(trials))))
    return removed[::-1]


@pytest.mark.parametrize("start", [0, 1, "last"])
@pytest.mark.parametrize("name", FAMILIES)
def test_lean_scores_equal_the_full_forward(name, start):
    vit, x = carrying(make(name), start), images(SIZE)
    with torch.no_grad():
        scores = tokens.logits(vit, x)
        encoded = tokens.encode(vit, x)
        assert close(scores, vit(x), 2e-5) and close(scores, vit.forward_head(encoded.all), 2e-5)
        assert scores.shape == (2, CLASSES) and scores.std() > 1e-3
        assert encoded.prompts.shape == (2, CLASSES, vit.embed_dim) and encoded.map.shape[-2:] == (4, 7)
        ranking = class_heads.rank(vit, x, TARGET)
        assert close(ranking.scores[:, -1], scores.gather(1, TARGET[:, None])[:, 0], 2e-5)
        rows = class_heads.class_attention(vit, x)
        assert torch.allclose(tokens.attention_maps(vit, x)[0][:, :, :CLASSES], rows, atol=1e-6)
        assert torch.allclose(ranking.evidence.attention, torch.stack([rows[0, :, 4], rows[1, :, 1]]), atol=1e-6)
    assert torch.equal(ranking.heads.sort(1).values, torch.arange(4).expand(2, -1))


@pytest.mark.parametrize("start", [0, 1, "last"])
@pytest.mark.parametrize("name", ["plain", "dinov2_registers", "no_class_token", "avg_fc_norm"])
def test_equals_the_straightforward_forward_and_ranking(name, start):
    vit, x = carrying(make(name), start), images(SIZE)
    with torch.no_grad():
        assert close(tokens.logits(vit, x), straightforward(vit, x), 2e-5)
        blurred = class_heads.blurred_scores(vit, x, 3, [0, 2])
        assert close(blurred, straightforward(vit, x, (3, [0, 2])), 2e-5)
        ranks = class_heads.rank_heads(vit, x, TARGET)
        for row, target, one in zip(ranks, TARGET.tolist(), x, strict=True):
            assert row.tolist() == brute_force(vit, one[None], target)


@pytest.mark.parametrize("family", ["plain", "dinov3", "dinov2_registers", "no_class_token", "deit_distilled"])
@pytest.mark.parametrize(
    "verb,below,options",
    [
        ("adapt", "vpt", {"prompts": 2}),
        ("adapt", "lora", {"rank": 2}),
        ("adapt", "adaptformer", {"bottleneck": 4, "dropout": 0.0}),
        ("adapt", "dvpt", {"prompts": 3, "bottleneck": 4, "gate_init": 0.5}),
    ],
)
def test_on_top_of_other_adaptations(family, verb, below, options):
    module = importlib.import_module(f"vitkit.{verb}.{below}")
    x = images(SIZE)
    for start in (1, "last"):
        vit = module.inject(make(family), module.Settings(**options))
        with torch.no_grad():
            for name, parameter in vit.named_parameters():
                if module.trains(name):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            carrying(vit, start)
            scores = tokens.logits(vit, x)
            assert close(scores, vit(x), 2e-5)
            ranking = class_heads.rank(vit, x, TARGET)
            assert close(ranking.scores[:, -1], scores.gather(1, TARGET[:, None])[:, 0], 2e-5)
            assert torch.equal(tokens.logits(copy.deepcopy(vit), x), scores)
            assert vit.forward_head(tokens.encode(vit, x).all, pre_logits=True).shape == (2, vit.embed_dim)


def test_last_block_that_mixes_tokens_is_ranked_exactly():
    """DVPT's prompts read the patches in its MLP half, so that trials cannot run on one token alone."""
    from vitkit.adapt import dvpt

    vit = dvpt.inject(make("plain"), dvpt.Settings(prompts=3, bottleneck=4, gate_init=0.5))
    carrying(vit)
    x = images(SIZE)
    assert not vit.blocks[-1].tokenwise
    with torch.no_grad():
        everything = class_heads.blurred_scores(vit, x, 2, [])
        assert close(everything, vit(x), 2e-5)
        assert class_heads.rank_heads(vit, x, 2).shape == (2, 4)


def test_the_feature_stays_the_pooled_one():
    vit, x = make("plain"), images(SIZE)
    with torch.no_grad():
        carrying(vit)
        tokens_behind = tokens.encode(vit, x)
        want = torch.cat([tokens_behind.prefix, tokens_behind.patches], dim=1)[:, 0]
        assert torch.equal(tokens.feature(vit, x), want)


def test_blurring_one_class_changes_no_other_score():
    vit, x = carrying(make("dinov3")), images(SIZE)
    plain = class_heads.blurred_scores(vit, x, TARGET, [])
    blurred = class_heads.blurred_scores(vit, x, TARGET, [0, 1, 2, 3])
    others = torch.ones(2, CLASSES, dtype=torch.bool).scatter_(1, TARGET[:, None], False)
    assert torch.equal(plain[others], blurred[others]) and not torch.equal(plain, blurred)


def test_of_equal_heads_the_lowest_is_blurred_first():
    vit, x = carrying(make("plain")), images(SIZE)
    with torch.no_grad():
        vit.blocks[-1].attn.proj.weight.zero_()  # no head changes anything
    assert class_heads.rank_heads(vit, x, TARGET).tolist() == [[3, 2, 1, 0]] * 2


def test_maps_and_saliency():
    vit, x = carrying(make("dinov2_registers")), images(SIZE)
    maps = prompt_cam.class_maps(vit, x, TARGET)
    assert maps.shape == (2, 4, 4, 7)
    assert torch.allclose(maps[1], prompt_cam.class_maps(vit, x[1:], 1)[0], atol=1e-6)
    ranks = prompt_cam.rank_heads(vit, x, TARGET)
    assert torch.allclose(prompt_cam.saliency(vit, x, TARGET, top=1), maps[torch.arange(2), ranks[:, 0]])
    assert torch.allclose(prompt_cam.saliency(vit, x, TARGET), maps.mean(1), atol=1e-7)
    vit.train()
    vit.blocks[0].prompt_dropout = 0.5
    assert torch.equal(prompt_cam.class_maps(vit, x, TARGET), maps) and vit.training and vit.blocks[0].training


def test_prompt_dropout_is_one_mask_for_the_batch():
    vit = make("plain")
    inject(vit, Settings(prompts=CLASSES, prompt_dropout=0.5, start=1))
    torch.manual_seed(0)
    entered = vit.blocks[1].train().entering(torch.zeros(3, 4, 48))[:, :CLASSES]
    assert torch.equal(entered[0], entered[2]) and bool((entered == 0).any())
    assert bool((vit.blocks[0].train().extra_keys() == 0).any())
    assert torch.equal(vit.blocks[0].eval().extra_keys(), vit.blocks[0].helper_prompts)


def test_only_prompts_and_scorer_train_and_all_are_decayed():
    method = PromptCAM(make("plain"), Settings(), task=Task("single", ("a", "b", "c")), classify=Classify())
    assert method.settings.prompts == 3
    trained = {name: p for name, p in method.vit.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 3 * 3 * 48 + 48 + 1
    group = method.param_groups(0.001)[0]
    assert len(group["params"]) == len(trained) and group["weight_decay"] == 0.001
    loss = method({"image": images(SIZE), "label": torch.tensor([0, 2])})["loss"]
    loss.backward()
    for name, parameter in trained.items():
        assert parameter.grad is not None and (name == "head.bias" or parameter.grad.abs().sum() > 0), name


def test_several_labels_an_image():
    method = PromptCAM(make("plain"), Settings(prompt_dropout=0.0), task=Task("multi", ("a", "b"))).eval()
    labels = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    out = method({"image": images(SIZE), "label": labels})
    known = ~labels.isnan()
    want = torch.nn.functional.binary_cross_entropy_with_logits(out["logits"][known], labels[known])
    assert torch.allclose(out["loss"], want)
    assert torch.equal(method.predict(images(SIZE)), out["logits"].detach().sigmoid())


@pytest.mark.parametrize("family", ["plain", "deit_distilled", "dinov3"])
def test_another_head_on_top_reads_the_pooled_feature(family):
    vit, x = carrying(make(family)), images(SIZE)
    install_head(vit, "linear", 1)
    torch.nn.init.normal_(vit.head.weight)
    with torch.no_grad():
        assert close(tokens.logits(vit, x), vit.head(tokens.feature(vit, x)), 1e-6)
        assert close(tokens.logits(vit, x), vit(x), 2e-5)
    with pytest.raises(ConfigError, match="not read: it has another head"):
        class_heads.rank_heads(vit, x, 0)


def run(tmp_path, data, **more):
    out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    options = {
        "arch_kwargs": {"embed_dim": 24, "depth": 3, "num_heads": 3},
        "pretrained": False,
        "image_size": 32,
        "patch_size": 8,
        "epochs": 1,
        "max_steps": 2,
        "batch_size": 8,
        "workers": 0,
        "accelerator": "cpu",
        "quiet": True,
    }
    return vitkit.explain("prompt_cam", model="vit_tiny_patch16_224", data=str(data), out=str(out), **options, **more)


def test_a_run_reloads_to_equal_numbers(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    data = tmp_path / "data.npz"
    np.savez(data, images=rng.integers(0, 255, (40, 32, 32, 3), np.uint8), labels=np.arange(40) % 4)
    done = run(tmp_path, data, start=1, normalise="half", lr=0.1)
    passport = json.loads((done.path / "passport.json").read_text())
    settings = passport["steps"][-1]["settings"]
    assert passport["steps"][-1]["method"] == "explain.prompt_cam"
    assert settings["prompts"] == 4 and settings["start"] == 1
    assert passport["preprocess"]["mean"] == [0.5] * 3 and len(passport["classes"]) == 4
    model, again = vitkit.load(done.path, say=None), vitkit.load(done.path, say=None)
    x = torch.rand(3, 3, 32, 48)
    assert model.vit.num_classes == 4 and model.vit.reads_prompts
    assert torch.equal(model(x), again(x)) and model(x).shape == (3, 4)
    assert prompt_cam.saliency(model.vit, x, 2).shape == (3, 4, 6)
    plain = weights.load(done.path, num_classes=0, say=None).eval()
    assert not plain.reads_prompts
    with torch.no_grad():
        assert plain(x).shape == (3, 24)


def official(tmp_path, classes=3, **config):
    """A file in the authors' layout, made from a ViT of ours."""
    arch = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [32, 48], "patch_size": 8, **config}
    vit = weights.load("vit_tiny_patch16_224", pretrained=False, arch_kwargs=arch, say=None)
    state = {name: value for name, value in vit.state_dict().items() if not name.startswith("head")}
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(arch["depth"], classes, 32, generator=generator)
    state |= {"vpt.prompt_embeddings": table, "head.weight": torch.randn(1, 32, generator=generator)}
    state["head.bias"] = torch.ones(1)
    path = tmp_path / "model.pt"
    torch.save({"model_state_dict": state}, path)
    (tmp_path / "config.json").write_text(json.dumps(arch))
    return path, table


@pytest.mark.parametrize("config", [{}, {"init_values": 0.5}, {"depth": 1}, {"mlp_ratio": 2.0, "num_heads": 4}])
def test_official_files_load_in_two_lines(tmp_path, config):
    path, table = official(tmp_path, **config)
    vit = weights.load(path, num_classes=None, say=None)
    load_official(vit, vit.extras).eval()
    x = images((32, 48))
    with torch.no_grad():
        assert close(tokens.logits(vit, x), straightforward(vit, x), 2e-5)
    assert torch.equal(vit.class_prompts, table[-1]) and vit.num_classes == 3
    assert vit.passport.preprocess.mean == (0.5,) * 3 == vit.passport.preprocess.std
    assert class_heads.rank_heads(vit, x, 2)[0].tolist() == brute_force(vit, x[:1], 2)


def test_lagging_rates():
    rates = lagging_lr(lr=0.005, lr_min=1e-6, warmup=4, warmup_lr=0.0, epochs=10)
    assert rates[:3] == [0.0, 0.0, 0.00125] and len(rates) == 10
    assert rates[5] < rates[4] + 0.00125  # the curve jumps down where warm-up ends: the cosine is not shifted
    assert lagging_lr(lr=0.1, lr_min=0.0, warmup=0, warmup_lr=0.0, epochs=3)[:2] == [0.1, 0.1]


def test_errors_say_what_to_do():
    task = Task("single", ("a", "b"))
    with pytest.raises(ConfigError, match="prompts is 0"):
        Settings(prompts=0)
    with pytest.raises(ConfigError, match=r"prompt_dropout is 1\.5"):
        Settings(prompt_dropout=1.5)
    with pytest.raises(ConfigError, match=r"normalise is 'imagenet'\n  fix: one of: trunk, half"):
        Settings(normalise="imagenet")
    for start in (3, -4):
        with pytest.raises(ConfigError, match=rf"start names block {start}\n.*blocks 0\.\.2, or 'last'"):
            inject(make("plain"), Settings(start=start, prompts=2))
    with pytest.raises(ConfigError, match=r"no labels to count\n.*prompts=<number of classes>"):
        inject(make("plain"), Settings())
    with pytest.raises(ConfigError, match="prompts is 7 for 2 classes"):
        PromptCAM(make("plain"), Settings(prompts=7), task=task)
    with pytest.raises(ConfigError, match="head=bn_linear, pool=keep"):
        PromptCAM(make("plain"), Settings(), task=task, classify=Classify(head="bn_linear"))
    vit, x = carrying(make("plain")), images(SIZE)
    with pytest.raises(ConfigError, match="already carries the class prompts"):
        inject(vit, Settings(prompts=2))
    for wrong in (5, -1, torch.tensor([0, 9])):
        with pytest.raises(ConfigError, match=r"class -?\d does not exist\n.*classes 0\.\.4"):
            class_heads.rank_heads(vit, x, wrong)
    for wrong in (0.7, torch.tensor([0.7, 1.2]), True):
        with pytest.raises(ConfigError, match=r"classes of type torch.(float32|bool)\n  fix: whole class indices"):
            class_heads.rank_heads(vit, x, wrong)
    with pytest.raises(ConfigError, match=r"\(3,\) classes for 2 images"):
        class_heads.class_maps(vit, x, torch.tensor([0, 1, 2]))
    with pytest.raises(ConfigError, match=r"head 4 does not exist\n.*heads 0\.\.3"):
        class_heads.blurred_scores(vit, x, 0, [4])
    with pytest.raises(ConfigError, match="top is 0"):
        class_heads.saliency(vit, x, 0, top=0)
    for function, arguments in itertools.product((class_heads.rank_heads, class_heads.class_maps), [(x, 0)]):
        with pytest.raises(ConfigError, match=r"no class prompts\n.*vitkit explain prompt_cam"):
            function(make("plain"), *arguments)
    with pytest.raises(WeightsError, match="no prompts of Prompt-CAM"):
        load_official(make("plain"), {})
    extras = {
        "vpt.prompt_embeddings": torch.zeros(2, 7, 48),
        "head.weight": torch.zeros(1, 48),
        "head.bias": torch.ones(1),
    }
    with pytest.raises(WeightsError, match=r"\(2, 7, 48\): blocks, classes, width\n.*start=1, prompts=7"):
        load_official(vit, extras)
    with pytest.raises(WeightsError, match=r"scorer is missing\n.*num_classes=None"):
        load_official(make("plain"), {"vpt.prompt_embeddings": torch.zeros(2, 7, 48)})
