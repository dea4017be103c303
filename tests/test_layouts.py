"""Authors' layouts are told apart by their keys; every tensor is used, kept aside, or named."""

import pytest
import torch

from vitkit import layouts
from vitkit.errors import WeightsError
from vitkit.parts.positions import sincos_2d

DIM, HIDDEN, PATCH = 16, 32, 4


def block(i, dim=DIM, hidden=HIDDEN, name="blocks"):
    out = {}
    for layer, shape in (
        ("norm1", None),
        ("attn.qkv", (3 * dim, dim)),
        ("attn.proj", (dim, dim)),
        ("norm2", None),
        ("mlp.fc1", (hidden, dim)),
        ("mlp.fc2", (dim, hidden)),
    ):
        weight = torch.randn(shape or (dim,))
        out |= {f"{name}.{i}.{layer}.weight": weight, f"{name}.{i}.{layer}.bias": torch.randn(weight.shape[0])}
    return out


def plain(depth=2, grid=4, norm="norm"):
    out = {
        "cls_token": torch.randn(1, 1, DIM),
        "pos_embed": torch.randn(1, grid * grid + 1, DIM),
        "patch_embed.proj.weight": torch.randn(DIM, 3, PATCH, PATCH),
        "patch_embed.proj.bias": torch.randn(DIM),
        f"{norm}.weight": torch.randn(DIM),
        f"{norm}.bias": torch.randn(DIM),
    }
    for i in range(depth):
        out |= block(i)
    return out


def decoder(depth=1):
    out = {"mask_token": torch.randn(1, 1, 8), "decoder_pos_embed": torch.randn(1, 17, 8)}
    for layer, shape in (("embed", (8, DIM)), ("norm", (8,)), ("pred", (48, 8))):
        out |= {f"decoder_{layer}.weight": torch.randn(shape), f"decoder_{layer}.bias": torch.randn(shape[0])}
    for i in range(depth):
        out |= block(i, 8, 16, "decoder_blocks")
    return out


def head(classes=5):
    return {"head.weight": torch.randn(classes, DIM), "head.bias": torch.randn(classes)}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_plain_with_and_without_head():
    trunk = plain()
    reading = layouts.read(trunk | head())
    assert same(reading.vit, trunk) and len(reading.vit) == 30 and not reading.extras
    assert set(reading.head) == {"head.weight", "head.bias"} and reading.positions == "timm"
    assert reading.summary(32) == "read as timm-style ViT: 30 tensors used, 2 in the head"


def test_mae_with_decoder_keeps_it_under_official_names():
    file = plain() | decoder()
    reading = layouts.read(file)
    assert reading.kind == "MAE encoder" and reading.positions == "mae" and not reading.notes
    assert same(reading.extras, {n: v for n, v in file.items() if n.startswith(("decoder", "mask_token"))})
    assert reading.summary(len(file)) == "read as MAE encoder: 30 tensors used, 20 decoder tensors left"


def test_mae_encoder_alone_says_that_it_cannot_reconstruct():
    file = plain()
    file["pos_embed"] = sincos_2d(DIM, (4, 4), prefix=1).unsqueeze(0)
    reading = layouts.read(file)
    assert reading.kind == "MAE encoder" and reading.positions == "mae"
    assert "decoder is not in this file" in reading.notes[0]
    assert layouts.read(plain()).kind == "timm-style ViT"  # a learned table is no sign of MAE


def test_finetuned_mae():
    reading = layouts.read(plain(norm="fc_norm") | head())
    assert "fc_norm" in reading.kind and reading.positions == "mae" and "fc_norm.weight" in reading.vit


def test_distilled_deit():
    reading = layouts.read(
        plain() | head() | {"dist_token": torch.ones(1, 1, DIM), "head_dist.weight": torch.ones(5, DIM)}
    )
    assert reading.kind == "distilled DeiT" and "head_dist.weight" in reading.head and "dist_token" in reading.vit


def adaptformer():
    file = layouts.to_adaptformer(plain())
    for i in range(2):
        for layer, shape in (("down_proj", (4, DIM)), ("up_proj", (DIM, 4))):
            file[f"blocks.{i}.adaptmlp.{layer}.weight"] = torch.randn(shape)
            file[f"blocks.{i}.adaptmlp.{layer}.bias"] = torch.randn(shape[0])
    return file


def test_adaptformer_round_trip():
    trunk = plain()
    file = layouts.to_adaptformer(trunk)
    assert "blocks.0.attn.q_proj.weight" in file and "blocks.1.fc2.bias" in file
    assert not any("qkv" in name or "mlp" in name for name in file)
    reading = layouts.read(file)
    assert same(reading.vit, trunk) and reading.kind == "AdaptFormer"


def test_adaptformer_rows_are_stacked_q_k_v():
    file = layouts.to_adaptformer(plain())
    qkv = layouts.read(file).vit["blocks.1.attn.qkv.weight"]
    parts = [file[f"blocks.1.attn.{letter}_proj.weight"] for letter in "qkv"]
    assert torch.equal(qkv, torch.cat(parts))


def test_adaptformer_adapters_prompts_and_head_are_kept():
    file = adaptformer() | {"embeddings.0": torch.ones(1, 3, DIM), "embeddings.1": torch.ones(1, 3, DIM)}
    file |= {"head.0.running_mean": torch.ones(DIM), "head.0.running_var": torch.ones(DIM)}
    file |= {
        "head.0.num_batches_tracked": torch.tensor(2),
        "head.1.weight": torch.ones(5, DIM),
        "head.1.bias": torch.ones(5),
    }
    reading = layouts.read(file)
    assert len(reading.extras) == 10 and "blocks.0.adaptmlp.down_proj.weight" in reading.extras
    assert len(reading.head) == 5 and len(reading.vit) == 30
    assert "8 adapter tensors, 2 prompt tensors left" in reading.summary(len(file))
    assert "adapt.adaptformer" in reading.notes[0] and "adapt.vpt" in reading.notes[1]


def test_adaptformer_with_a_part_missing():
    file = adaptformer()
    del file["blocks.0.attn.k_proj.bias"]
    with pytest.raises(WeightsError, match=r"q_proj\.bias is there but blocks\.0\.attn\.k_proj\.bias is not"):
        layouts.read(file)


def videomae():
    file = {}
    for name, value in plain().items():
        if name in ("cls_token", "pos_embed"):
            continue
        if name.endswith("qkv.bias"):
            q, _, v = value.chunk(3)
            file |= {name.replace("qkv.bias", "q_bias"): q, name.replace("qkv.bias", "v_bias"): v}
        else:
            file[name] = value
    file["patch_embed.proj.weight"] = torch.randn(DIM, 3, 2, PATCH, PATCH)
    return file


def test_videomae_prefix_and_biases():
    encoder = videomae()
    outside = {"mask_token": torch.ones(1, 1, 8), "encoder_to_decoder.weight": torch.ones(8, DIM)}
    outside |= {f"decoder.{n}": v for n, v in block(0, 8, 16).items()}
    file = {f"encoder.{n}": v for n, v in encoder.items()} | outside
    reading = layouts.read(file)
    bias = reading.vit["blocks.0.attn.qkv.bias"]
    assert torch.equal(bias[:DIM], encoder["blocks.0.attn.q_bias"]) and not bias[DIM : 2 * DIM].any()
    assert torch.equal(bias[2 * DIM :], encoder["blocks.0.attn.v_bias"])
    assert reading.kind == "VideoMAE encoder" and same(reading.extras, outside) and "norm.weight" in reading.vit
    assert "14 decoder tensors left" in reading.summary(len(file))
    assert any("'encoder.'" in note for note in reading.notes)


def test_beit_layer_scale_names():
    file = videomae() | {"blocks.0.gamma_1": torch.ones(DIM), "blocks.0.gamma_2": torch.ones(DIM)}
    file["patch_embed.proj.weight"] = torch.randn(DIM, 3, PATCH, PATCH)
    reading = layouts.read(file)
    assert "blocks.0.ls1.gamma" in reading.vit and "blocks.0.ls2.gamma" in reading.vit
    assert reading.kind.startswith("BEiT-style")
    assert "blocks.0.attn.q_bias" in layouts.read(file, plain=True).vit  # Eva keeps its own names


def dinov2(registers=0, swiglu=False):
    file = plain() | {"mask_token": torch.ones(1, DIM)}
    for i in range(2):
        file |= {f"blocks.{i}.ls1.gamma": torch.ones(DIM), f"blocks.{i}.ls2.gamma": torch.ones(DIM)}
    if registers:
        file["register_tokens"] = torch.randn(1, registers, DIM)
    if swiglu:
        file = {n.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for n, v in file.items()}
    return file


def test_dinov2():
    reading = layouts.read(dinov2())
    assert reading.kind == "DINOv2" and reading.positions == "dinov2" and list(reading.extras) == ["mask_token"]
    assert reading.summary(35) == "read as DINOv2: 34 tensors used, 1 other tensor (mask_token) left"


def test_dinov2_with_registers_moves_the_class_position_into_the_token():
    file = dinov2(registers=4)
    reading = layouts.read(file)
    assert reading.positions == "timm" and reading.hints["no_embed_class"]
    assert torch.equal(reading.vit["cls_token"], file["cls_token"] + file["pos_embed"][:, :1])
    assert torch.equal(reading.vit["pos_embed"], file["pos_embed"][:, 1:])
    assert torch.equal(reading.vit["reg_token"], file["register_tokens"])


def test_dinov2_chunks_and_swiglu():
    file = {n.replace("blocks.", "blocks.0."): v for n, v in dinov2(swiglu=True).items()}
    names = set(layouts.read(file).vit)
    assert "blocks.1.attn.qkv.weight" in names and "blocks.0.mlp.fc1.weight" in names
    assert not any("w12" in name for name in names)


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_fsdp_wrapped_module.{}"])
def test_wrappers_are_removed(wrap):
    file = plain() | head()
    reading = layouts.read({wrap.format(name): value for name, value in file.items()})
    assert set(reading.vit) | set(reading.head) == set(file) and not reading.notes


def test_wrappers_inside_names():
    file = {name.replace("blocks.0.", "blocks.0._orig_mod."): value for name, value in plain().items()}
    assert set(layouts.read(file).vit) == set(plain())


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "student.encoder.", "vit."])
def test_any_prefix_is_found_and_the_rest_is_reported(prefix):
    file = {prefix + name: value for name, value in plain().items()} | {"dino_head.mlp.0.weight": torch.ones(2, 2)}
    reading = layouts.read(file)
    assert set(reading.vit) == set(plain()) and list(reading.extras) == ["dino_head.mlp.0.weight"]
    assert "1 projection head tensor left" in reading.summary(len(file))


def test_two_trunks_are_ambiguous():
    file = {f"{p}.{name}": value for p in ("student", "teacher") for name, value in plain().items()}
    with pytest.raises(WeightsError, match=r"holds 2 trunks, under the prefixes 'student\.', 'teacher\.'"):
        layouts.read(file)


def test_moco_v3():
    file = {f"module.{p}.{n}": v for p in ("base_encoder", "momentum_encoder") for n, v in (plain() | head()).items()}
    reading = layouts.read(file | {"module.predictor.0.weight": torch.ones(2)})
    assert reading.kind == "MoCo v3 encoder" and reading.hints["num_heads"][384] == 12 and not reading.head
    assert set(reading.vit) == set(plain()) and len(reading.extras) == 35


def test_21k_representation_layer_takes_its_head_along():
    reading = layouts.read(plain() | head() | {"pre_logits.fc.weight": torch.ones(DIM, DIM)})
    assert not reading.head and len(reading.extras) == 3 and "representation layer" in reading.notes[0]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["embeddings.patch_embeddings.projection.weight"], "Hugging Face transformers"),
        (["visual.transformer.resblocks.0.ln_1.weight"], "OpenAI's CLIP"),
        (["conv1.weight", "layer1.0.conv1.weight"], "ResNet"),
        (["blocks.0.adaptmlp.up_proj.weight"], "adapters alone"),
        (["w", "b"], r"e\.g\. w, b"),
    ],
)
def test_foreign_files_are_named(names, words):
    with pytest.raises(WeightsError, match=words):
        layouts.read({name: torch.ones(1) for name in names})


def test_tensors_that_collide_without_wrappers():
    with pytest.raises(WeightsError, match="1 tensors appear twice"):
        layouts.read({"_orig_mod.a": torch.ones(1), "a": torch.ones(1)})


def clip(width=DIM, depth=2, prefix="visual."):
    """OpenAI's CLIP: the visual tower under `visual.`, the text tower beside it."""
    out = {
        "class_embedding": torch.randn(width),
        "conv1.weight": torch.randn(width, 3, PATCH, PATCH),
        "positional_embedding": torch.randn(17, width),
        "proj": torch.randn(width, 12),
    }
    out |= {f"ln_{end}.{kind}": torch.randn(width) for end in ("pre", "post") for kind in ("weight", "bias")}
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
        for layer, rows, columns in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes |= {f"{layer}.weight": (rows, columns), f"{layer}.bias": (rows,)}
        shapes |= {f"ln_{k}.{kind}": (width,) for k in (1, 2) for kind in ("weight", "bias")}
        out |= {f"{block}.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return {prefix + name: value for name, value in out.items()}


def test_clips_visual_tower_beside_its_text_tower():
    text = {"positional_embedding": torch.randn(9, 8), "ln_final.weight": torch.randn(8), "logit_scale": torch.ones(())}
    text |= {"transformer.resblocks.0.ln_1.weight": torch.randn(8)}
    file = clip() | text
    reading = layouts.read(file)
    assert reading.kind == "CLIP's visual ViT" and same(reading.extras, text)
    assert reading.hints["norm_eps"] == 1e-5 and reading.hints["act_layer"] == "quick_gelu"
    assert torch.equal(reading.head["head.weight"], file["visual.proj"].T)
    assert reading.vit["cls_token"].shape == (1, 1, DIM) and reading.vit["pos_embed"].shape == (1, 17, DIM)
    expected = {
        "attn.in_proj_weight": "attn.qkv.weight",
        "attn.out_proj.bias": "attn.proj.bias",
        "mlp.c_fc.weight": "mlp.fc1.weight",
        "mlp.c_proj.bias": "mlp.fc2.bias",
        "ln_2.weight": "norm2.weight",
    }
    for old, new in expected.items():
        assert torch.equal(reading.vit[f"blocks.1.{new}"], file[f"visual.transformer.resblocks.1.{old}"])
    assert reading.summary(len(file)).startswith(
        "read as CLIP's visual ViT: 31 tensors used, 1 in the head, 3 text tower"
    )


def test_dvpts_prompts_beside_clip_are_kept_aside():
    prompts = {"encoder.prompt_token": torch.randn(1, 4, DIM)}
    prompts |= {
        "encoder.transformer.resblocks.0.prompt_proj.prompt_gate": torch.zeros(1),
        "fc_head.weight": torch.ones(3, 12),
    }
    reading = layouts.read(clip(prefix="encoder.") | prompts)
    assert not reading.head and set(reading.extras) == {
        "prompt_token",
        "transformer.resblocks.0.prompt_proj.prompt_gate",
        "proj",
        "fc_head.weight",
    }
    assert "its prompts are kept aside: vitkit.adapt.dvpt takes them" in reading.notes
