"""The collapse doctor: every rule is induced in a real, tiny training; a healthy one is left in peace."""

from __future__ import annotations

import torch

import vitkit
from tests.pretrain.test_dinov2 import RUN, batch, make, now
from vitkit.run.collapse import Doctor, Facts, table


def train(steps=40, lr=1e-3, data=None, **settings):
    """Rules found in a bare loop over the method, with records of every 4 steps as the loop would log them."""
    method = make(**settings)
    images = data or batch(8)
    method.rows = 2 * len(images["image"])  # `require` would refuse what some of these runs are about
    groups = method.param_groups(0.04)
    optimizer = torch.optim.AdamW(groups, lr=lr)
    said, sums = [], {}
    for step in range(steps):
        method.before_step(now(step / 4, epochs=steps // 2, each=4), optimizer.param_groups)
        for group in optimizer.param_groups:
            group["lr"] = lr
        method.temperature = settings.get("teacher_temp", 0.05)
        out = method(images)
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(step)
        for name, value in out.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach()) / 4
        if step % 4 == 3:
            said += method.watch({"step": step + 1, **sums, "lr": lr})
            sums = {}
    return [finding.rule for finding in method._doctor.findings], said


def test_a_healthy_run_is_left_in_peace():
    rules, said = train()
    assert rules == [] and said == []


def test_uniform_heads():
    rules, said = train(teacher_temp=5.0, teacher_temp_start=5.0, steps=110)
    assert rules[0] == "uniform heads"
    assert "ln K is 3.18" in said[0] and "a lower teacher_temp" in said[0]


def test_one_hot_collapse():
    """Without a moving centre and with sharp targets every image runs into the same prototype."""
    rules, said = train(
        center_momentum=1.0, teacher_temp=0.005, teacher_temp_start=0.005, koleo_weight=0.0, steps=160, lr=3e-3,
        teacher_momentum=0.5,
    )  # fmt: skip
    assert "one-hot collapse" in rules
    assert any("all images get the same prototype" in one and "sinkhorn_knopp" in one for one in said)


def test_identical_images():
    images = batch(8)
    for name in ("image", "image_2"):
        images[name][1] = images[name][0]
    hidden = torch.zeros(16, 16, dtype=torch.bool)
    hidden[::4, :4] = True
    hidden[0] = hidden[1] = False
    rules, said = train(data={**images, "masks": hidden}, steps=16)
    assert rules == ["identical images"]
    assert "KoLeo is infinite for 25% of the images" in said[0] and "duplicate or blank" in said[0]


def test_the_teacher_is_the_student():
    rules, said = train(teacher_momentum=0.0, steps=16)
    assert rules[0] == "teacher is the student"
    assert "the model only agrees with itself" in said[0] and "teacher_momentum 0.992" in said[0]


def test_the_teacher_never_moves():
    rules, said = train(teacher_momentum=1.0, steps=24)
    assert rules == ["teacher never moves"]
    assert "the teacher never moves" in said[0] and "teacher_momentum below 1" in said[0]


def test_a_batch_too_small_for_sinkhorn():
    rules, said = train(centering="sinkhorn_knopp", data=batch(2), koleo_weight=0.0, steps=24)
    assert "batch too small for Sinkhorn" in rules
    assert "4 rows share 24 prototypes" in said[0] and "batch_size" in said[0]


def test_rank_collapse():
    """A huge rate without KoLeo flattens the features."""
    rules, said = train(koleo_weight=0.0, lr=0.3, steps=60)
    assert "rank collapse" in rules
    assert any("from its nearest neighbour" in one for one in said)


def test_rank_collapse_into_few_directions():
    """KoLeo turned round pulls images together."""
    rules, _ = train(koleo_weight=-1.0, lr=3e-3, steps=40)
    assert "rank collapse" in rules


def test_a_finding_is_said_once_and_listed_in_the_report():
    doctor = Doctor(Facts(prototypes=24, rows=16))
    record = {"target_entropy": 0.5, "prototypes_used": 1.0, "rank": 5.0, "nearest": 0.5, "twins": 0.0, "lr": 1.0}
    record |= {"teacher_gap": 0.1, "teacher_step": 0.01, "dino_local": 1.0, "dino_global": 1.0}
    found = [len(doctor.note({**record, "step": step})) for step in range(1, 6)]
    assert found == [0, 0, 1, 0, 0]
    shown = table(doctor.findings)
    assert shown["rows"][0][:2] == ["one-hot collapse", 3]
    assert table([])["rows"][0][0] == "none"
    assert doctor.note({"step": 9, "val_loss": 1.0}) == []  # a record of a validation


def test_it_speaks_during_training_and_in_the_report(tmp_path, capsys):
    run = vitkit.pretrain(
        "dinov2", **{**RUN, "quiet": False}, out=tmp_path / "a", max_steps=20, teacher_momentum=1.0, epochs=1
    )
    assert "collapse doctor: the teacher never moves" in capsys.readouterr().err
    assert "teacher never moves" in (run.path / "report.html").read_text()
