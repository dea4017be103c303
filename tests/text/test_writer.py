"""The report writer: its loss and generation, what trains when, metrics, baselines, and the whole verb on tiny data."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import vitkit
from vitkit.data import read
from vitkit.errors import ConfigError, DataError, MissingExtra, WeightsError
from vitkit.run import captioning_job
from vitkit.text import language, scores
from vitkit.text.settings import Settings
from vitkit.text.writer import ReportWriter, batches_of, shortened

from ..run.test_measure import outside
from ..run.test_protocols_masks import MODEL

TINY = {"lm_layers": 1, "lm_width": 32, "lm_vocabulary": 300, "dropout": 0.0}
TEXTS = ["a bright square on the left", "a dark disc on the right", "no object is seen"]


@pytest.fixture(scope="module")
def parts():
    settings = Settings(text_column="text", **TINY)
    lm, tokenizer = language.tiny(TEXTS, settings, seed=0)
    return lm, tokenizer, settings


def writer_of(parts, **more) -> ReportWriter:
    import copy

    lm, tokenizer, settings = parts
    torch.manual_seed(0)
    settings = Settings(**{**vars(settings), **{k: v for k, v in more.items() if k != "new"}})
    return ReportWriter(copy.deepcopy(lm), tokenizer, 12, settings, new=more.get("new", True))


def test_a_tokenizer_from_the_texts_spells_any_text(parts):
    _, tokenizer, _ = parts
    for text in (*TEXTS, "Überlagert: 3 cm², ?!"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer) <= 300 and tokenizer.eos_token == "</s>"
    again = language.tiny(TEXTS, parts[2], seed=0)
    assert all(torch.equal(a, b) for a, b in zip(parts[0].parameters(), again[0].parameters(), strict=True))


def test_the_loss_is_of_the_texts_tokens_alone(parts):
    """Against the definition, one text at a time: patches, prompt and begin in front, no padding, no loss on them."""
    writer = writer_of(parts, prompt="findings").eval()
    patches, ids = torch.randn(3, 5, 12), writer.ids(TEXTS)
    out = writer({"image": patches, "text": ids})["loss"]
    total, count = 0.0, 0
    for x, row in zip(patches, ids, strict=True):
        row = row[row >= 0]
        assert row[-1] == writer.tokenizer.eos_token_id
        start = torch.cat([writer.projector(x[None]), writer.lm.get_input_embeddings()(writer.prefix)[None]], 1)
        logits = writer.lm(inputs_embeds=torch.cat([start, writer.lm.get_input_embeddings()(row)[None]], 1)).logits[0]
        total += F.cross_entropy(logits[start.shape[1] - 1 : -1], row, reduction="sum")
        count += len(row)
    assert torch.allclose(out, total / count, rtol=1e-5)
    each = writer.text_losses(patches, ids)
    assert each.shape == (3,)
    out.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in writer.projector.parameters())


def test_greedy_writing_is_the_argmax_loop(parts):
    writer = writer_of(parts).eval()
    patches = torch.randn(2, 4, 12)
    said = writer.write(patches, longest=6)
    assert len(said) == 2 and all(isinstance(one, str) for one in said)
    x, found = writer.before(patches[:1]), []
    for _ in range(6):
        token = int(writer.lm(inputs_embeds=x).logits[0, -1].argmax())
        if token == writer.tokenizer.eos_token_id:
            break
        found.append(token)
        x = torch.cat([x, writer.lm.get_input_embeddings()(torch.tensor([[token]]))], 1)
    assert writer.tokenizer.decode(found, skip_special_tokens=True).strip() == said[0]
    assert len(writer.write(patches, beams=3, longest=4)) == 2


def test_the_projector_learns_first(parts):
    writer = writer_of(parts, new=False)
    assert writer.first == 1.0 and writer.scale == 0.02
    groups = writer.param_groups(0.01)
    assert sum(len(g["params"]) for g in groups) == len(list(writer.parameters()))
    for epoch, rate in ((0.5, 0.0), (1.0, 2e-5)):
        for group in groups:
            group["lr"] = 1e-3 * group.get("lr_scale", 1.0)
        writer.before_step(SimpleNamespace(epoch=epoch), groups)
        assert {g["lr"] for g in groups if g.get("lm")} == {rate} and {g["lr"] for g in groups if not g.get("lm")} == {
            1e-3
        }
    assert writer_of(parts, new=True).first == 0.0 and writer_of(parts, projector_epochs=3.0, lm_scale=0.5).scale == 0.5
    assert len([m for m in writer_of(parts, projector_layers=4).projector if hasattr(m, "weight")]) == 4


def test_batches_are_every_pair_once_in_an_order_of_seed_and_epoch(parts):
    writer, patches = writer_of(parts), np.arange(3)[:, None, None] * np.ones((3, 2, 12), np.float16)
    texts = [TEXTS[:2], [TEXTS[2]], TEXTS[:1]]
    batches, steps = batches_of(writer, patches, texts, batch_size=2, seed=0)
    assert steps == 2
    seen = list(batches(0, 0))
    pairs = {
        (float(x[0, 0]), writer.tokenizer.decode(t[t >= 0], skip_special_tokens=True).strip())
        for b in seen
        for x, t in zip(b["image"], b["text"], strict=True)
    }
    assert pairs == {(0.0, TEXTS[0]), (0.0, TEXTS[1]), (1.0, TEXTS[2]), (2.0, TEXTS[0])}
    assert torch.equal(next(batches(0, 1))["image"], seen[1]["image"])
    orders = {tuple(float(x) for b in batches(e, 0) for x in b["image"][:, 0, 0]) for e in range(6)}
    assert len(orders) > 1


def test_a_text_too_long_for_the_language_model_is_refused(parts):
    writer = writer_of(parts)
    with pytest.raises(ConfigError, match=r"2040 patches and texts of up to 20 tokens are 2061[\s\S]*fewer max_words"):
        writer.require_room(2040, 20)
    writer.require_room(2000, 20)


# ---------------------------------------------------------------- scores


def test_rouge_and_bleu_are_their_definitions():
    said = ["the cat sat on the mat", "a dog runs in the park today"]
    truths = [["a cat sat on a mat", "the cat lay there"], ["a dog runs in the green park today"]]

    def lcs(a, b):
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
        return table[-1, -1]

    def f(a, b):
        a, b = a.split(), b.split()
        return 2 * lcs(a, b) / (len(a) + len(b))

    want = [max(f(s, t) for t in ts) for s, ts in zip(said, truths, strict=True)]
    assert np.allclose(scores.rouge_l(said, truths), want)
    from sacrebleu.metrics import BLEU

    references = [[ts[i] if i < len(ts) else None for ts in truths] for i in range(2)]
    whole = BLEU(lowercase=True).corpus_score(said, references).score / 100
    counts = scores.bleu_counts(said, truths)
    assert counts.shape == (2, 10) and np.isclose(scores.bleu4(counts), whole)
    assert np.isclose(scores.bleu4(counts[[1]]), BLEU(lowercase=True).corpus_score(said[1:], [truths[1]]).score / 100)
    assert scores.bleu4(scores.bleu_counts(["a b c d e"], [["a b c d e"]])) == pytest.approx(1.0)
    with pytest.raises(DataError, match="2 written texts for 1 images"):
        scores.rouge_l(said, truths[:1])
    assert scores.most_frequent([["x y"], ["z", "z"], ["z"]]) == "z"
    assert scores.most_frequent([["a b c"], ["a b d"], ["q"]]) in ("a b c", "a b d")


def test_missing_packages_name_their_extra(monkeypatch):
    import sys

    for module, call in (
        ("sacrebleu.metrics", scores._bleu),
        ("rouge_score.rouge_scorer", scores._rouge),
        ("transformers", language.require_transformers),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtra, match=r"pip install 'vitkit\[text\]'"):
            call()


def test_strangers_are_other_patients_and_neighbours_are_near():
    images = read("digits", label_columns=[], say=None).subset(np.arange(12))
    images = type(images)(
        **{**{f: getattr(images, f) for f in images.__dataclass_fields__}, "group": np.repeat(list("abcd"), 3)}
    )
    other = captioning_job.strangers(images, 0)
    assert sorted(other.tolist()) == list(range(12)) and all(
        images.group[i] != images.group[j] for i, j in enumerate(other)
    )
    rng = np.random.default_rng(0)
    among = rng.normal(size=(20, 3, 5))
    assert captioning_job.nearest_rows(among[[4, 9]] * 2 - among.mean((0, 1)), among).tolist() == [4, 9]


# ---------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> str:
    """Bright and dark pictures, and two sentences that say which; one picture without a text."""
    folder = tmp_path_factory.mktemp("captions")
    rng = np.random.default_rng(0)
    rows = ["image,patient,split,text"]
    for i in range(40):
        bright = i % 2 == 0
        pixels = rng.normal(200 if bright else 60, 10, (24, 24))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02d}.png")
        word = "bright" if bright else "dark"
        split = "train" if i < 24 else "val" if i < 30 else "test"
        for text in (f"the whole field is {word}", f"{word} from edge to edge"):
            rows.append(f"{i:02d}.png,p{i},{split},{text if i != 3 else ''}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return str(folder / "labels.csv")


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "writer"
    more = {"text_column": "text", "epochs": 24, "batch_size": 8, "lr": 3e-3, "image_size": 24, **TINY}
    return vitkit.caption(**{**MODEL, **more}, data=table, out=str(out)), more


def test_it_writes_what_it_sees(trained, table):
    run, _ = trained
    figures = {m["name"]: m for m in run.summary["metrics"]}
    assert figures["rouge_l"]["value"] > 0.95 and figures["rouge_l"]["n"] == 10
    assert figures["rouge_l other image"]["value"] < 0.95 and figures["nats a token lost with another image"]["low"] > 0
    assert figures["bleu4"]["value"] > figures["bleu4 most frequent"]["value"]
    assert "does look at the image" in run.summary["verdict"]
    lines = (run.path / "predictions.csv").read_text().splitlines()
    assert lines[0] == "image,true,written,other_image,nearest_image,most_frequent" and len(lines) == 11
    assert "the whole field is bright | bright from edge to edge" in lines[1]
    page = (run.path / "report.html").read_text()
    assert outside(page) == [] and page.count("data:image/png") >= 10 and "nearest image" in page
    assert json.loads((run.path / "writer.json").read_text())["settings"]["lm"] == "tiny"


def test_a_finished_run_writes_for_new_images(trained, table, tmp_path):
    run, _ = trained
    said = vitkit.caption(run.path, table, out=tmp_path / "texts.csv")
    assert len(said) == 40
    right = sum(("bright" in text) == (int(name[:2]) % 2 == 0) for name, text in said.items())
    assert right >= 38
    assert (tmp_path / "texts.csv").read_text().startswith("image,text\n00.png,")
    kept = {
        line.split(",")[0]: line.split(",")[2] for line in (run.path / "predictions.csv").read_text().splitlines()[1:]
    }
    assert all(said[name] == text for name, text in kept.items())
    assert vitkit.weights.load(str(run.path), say=None) is not None


def test_the_same_settings_return_the_run_and_a_killed_one_resumes_exactly(trained, table, tmp_path, monkeypatch):
    run, more = trained
    assert vitkit.caption(**{**MODEL, **more}, data=table, out=str(run.path)).path == run.path
    short = {**MODEL, **more, "epochs": 2}
    whole = vitkit.caption(**short, data=table, out=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:

        def stop(self, now, groups):
            if now.step == 3:
                raise RuntimeError("killed")

        patch.setattr(ReportWriter, "before_step", stop)
        with pytest.raises(RuntimeError, match="killed"):
            vitkit.caption(**short, data=table, out=str(tmp_path / "killed"), save_every=1)
    again = vitkit.caption(**short, data=table, out=str(tmp_path / "killed"), save_every=1)
    from safetensors.torch import load_file

    for name in ("projector.safetensors", "lm/model.safetensors"):
        a, b = load_file(whole.path / name), load_file(again.path / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_saved_language_model_is_tuned_and_named(trained, table, tmp_path):
    run, more = trained
    settings = {**MODEL, **more, "lm": str(run.path / "lm"), "epochs": 1, "prompt": "say:"}
    tuned = vitkit.caption(**settings, data=table, out=str(tmp_path / "tuned"))
    assert (tuned.path / "lm" / "model.safetensors").is_file()


def test_what_cannot_be_written_says_why(trained, table, tmp_path):
    run, more = trained
    given = {**MODEL, **more, "data": table, "out": str(tmp_path / "x")}
    with pytest.raises(DataError, match=r"there is no column 'texts'[\s\S]*did you mean 'text'"):
        vitkit.caption(**{**given, "text_column": "texts"})
    with pytest.raises(ConfigError, match="text_column"):
        vitkit.caption(**{**given, "text_column": None})
    with pytest.raises(ConfigError, match=r"devices is 2, and vitkit caption trains in one process"):
        vitkit.caption(**given, devices=2)
    with pytest.raises(WeightsError, match=r"is not read as a causal language model[\s\S]*lm=tiny"):
        vitkit.caption(**{**given, "lm": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"labels_per_class draws by class"):
        vitkit.caption(**{**given, "out": str(tmp_path / "y")}, labels_per_class=2)
    with pytest.raises(ConfigError, match="lm_vocabulary is 10"):
        vitkit.caption(**{**given, "lm_vocabulary": 10})
    with pytest.raises(ConfigError, match="is no run of vitkit caption"):
        vitkit.caption(tmp_path, table)
    with pytest.raises(ConfigError, match=r"writes texts for images with a trained writer"):
        vitkit.caption(run.path)
    assert shortened(" a  b\nc d ", 3) == "a b c"


def test_the_command_line(trained, table, capsys, tmp_path):
    from vitkit.run.cli import main

    run, _ = trained
    assert main(["caption", str(run.path), table, "--out", str(tmp_path / "t.csv")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 40
    assert main(["caption", str(run.path)]) == 2
    assert "vitkit caption RUN DATA" in capsys.readouterr().err
    assert main(["caption", "--model", "vit_tiny_patch16_224", "--data", table, "--out", str(tmp_path / "q")]) == 2
    assert "text_column" in capsys.readouterr().err
