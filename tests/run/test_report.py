"""Reports: what the HTML holds, that nothing in it comes from elsewhere or runs, and that charts draw what they are given."""

import base64
import hashlib
import io
import itertools
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vitkit.errors import ConfigError, DataError
from vitkit.run.axes import MOST_POINTS, linear_axis, log_axis, running_mean, short, spread
from vitkit.run.charts import bar_chart, line_chart, scatter_chart
from vitkit.run.folder import RunFolder
from vitkit.run.report import Report, compare_report, run_report
from vitkit.run.tables import confusion_table, data_table

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Elements with their attributes and text; fails on tags that do not match."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {[e['tag'] for e in self.open]}"

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", **dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.elements.append({"tag": tag, "text": "", **dict(attributes)})

    def handle_endtag(self, tag):
        assert self.open and self.open[-1]["tag"] == tag, (
            f"</{tag}> closes {self.open[-1]['tag'] if self.open else None}"
        )
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag, cls=None):
        return [e for e in self.elements if e["tag"] == tag and (cls is None or cls in (e.get("class") or "").split())]

    def texts(self, tag, cls=None):
        return [element["text"].strip() for element in self.all(tag, cls)]


def full_report():
    report = Report(f"Title {EVIL}", subtitle="sub & title")
    report.sentence("It worked.")
    report.facts([("accuracy", 0.91234, "0.9 to 0.92"), ("time", "3 min")])
    rows = [
        ["a", SimpleNamespace(value=0.5, low=0.4, high=0.6), 1200],
        [EVIL, SimpleNamespace(value=0.75, low=None, high=None), 7],
    ]
    report.table(
        "Scores", ["method", "accuracy", "weights"], rows, "a note", best={"accuracy": "max", "weights": "min"}
    )
    report.curves(
        "Loss", {"train": [(i, 1 / (i + 1)) for i in range(50)], EVIL: [(0, 1, 0.5, 1.5), (9, 2, 1, 3)]}, x="epoch"
    )
    report.bars("Bars", [("one", 0.5, 0.4, 0.6), (EVIL, 0.25)], reference=("chance", 0.1))
    report.pictures("Pictures", [[(np.zeros((8, 8), np.uint8), EVIL), (np.ones((300, 200, 3), np.uint8), "big")]])
    report.confusion("Confusion", [[5, 1], [0, 4]], ["cat", EVIL])
    report.details("Settings", {"lr": 1e-3, "nested": {"depth": [1, 2]}, EVIL: EVIL})
    return report


# ---- the document --------------------------------------------------------------------------------------------------------


def test_the_page_is_well_formed_and_holds_what_was_said(tmp_path):
    path = full_report().write(tmp_path / "deep" / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.texts("h1") == [f"Title {EVIL}"] and page.texts("p", "subtitle") == ["sub & title"]
    assert page.texts("p", "verdict") == ["It worked."]
    assert page.texts("h2") == ["Scores", "Loss", "Bars", "Pictures", "Confusion"]
    assert "0.9123" in page.texts("dd")[0] and "0.9 to 0.92" in page.texts("dd")[0]
    assert page.texts("summary") == ["Settings"]
    assert dict(zip(page.texts("th"), page.texts("th"), strict=True)).get("nested.depth")
    assert not [e for e in page.all("details") if "open" in e]


def test_nothing_is_loaded_and_nothing_runs_but_the_sorting(tmp_path):
    html = full_report().html()
    page = Page(html)
    assert [e for e in page.elements if e["tag"] in ("link", "iframe", "object", "embed", "base")] == []
    (script,) = page.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    (policy,) = [e["content"] for e in page.all("meta") if e.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    addresses = [e[k] for e in page.elements for k in ("src", "href", "action", "poster") if e.get(k)]
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in addresses)
    assert not [k for e in page.elements for k in e if k.startswith("on")]
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}, (
        "the name of SVG, never fetched"
    )
    assert not re.search(r"@import|url\(", html)


def test_names_are_escaped_everywhere():
    html = full_report().html()
    assert "alert(1)" in html and EVIL not in html and "<script>alert" not in html
    page = Page(html)
    assert EVIL in page.texts("td")[3]
    assert EVIL in [e["alt"] for e in page.all("img")]
    assert any(EVIL in e.get("title", "") for e in page.all("td"))


def test_both_themes_and_small_screens():
    html = full_report().html()
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html and "color-scheme: light dark" in html
    light, dark = (re.findall(r"--c(\d): (#\w{6})", part) for part in html.split("prefers-color-scheme: dark")[:2])
    assert [i for i, _ in light] == [i for i, _ in dark] == list("012345")


def _linear(colour):
    parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def _oklab(rgb):
    cone = np.cbrt(
        np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]) @ np.clip(rgb, 0, 1)
    )
    return np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]) @ cone


# Machado, Oliveira and Fernandes 2009, severity 1.0: linear RGB as protanopes and deuteranopes see it.
VISION = {
    "normal": np.eye(3),
    "protan": np.array([[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]]),
    "deutan": np.array([[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9690]]),
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("theme", [0, 1])
def test_series_colours_stay_apart_for_the_colour_blind_and_stand_out(theme, vision):
    part = Report("x").html().split("prefers-color-scheme: dark")[theme]
    page_colour = re.search(r"--page: (#\w{6})", part)[1]
    colours = [colour for _, colour in re.findall(r"--c(\d): (#\w{6})", part)]
    seen = [_oklab(VISION[vision] @ _linear(colour)) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.10
    light = np.array([0.2126, 0.7152, 0.0722])
    for colour in colours:
        a, b = sorted([light @ _linear(colour), light @ _linear(page_colour)])
        assert (b + 0.05) / (a + 0.05) >= 3.0, f"{colour} on {page_colour}"


def test_contents_only_for_long_reports_with_unique_anchors():
    report = Report("Short")
    for title in ("A b", "A b", "A-b"):
        report.table(title, ["x"], [["1"]])
    assert not Page(report.html()).all("nav")
    report.table("???", ["x"], [["1"]])
    page = Page(report.html())
    ids = [e["id"] for e in page.all("section")]
    assert ids == ["a-b", "a-b-2", "a-b-3", "section"]
    assert [e["href"] for e in page.all("a")] == [f"#{one}" for one in ids]


def test_sections_collect_pieces():
    report = Report("x")
    report.section("Part one", "Some words.")
    report.table("T", ["x"], [[1]])
    report.curves("C", {"a": [(0, 1), (1, 2)]}, half=True)
    report.section("Empty")
    report.section("Part two")
    report.details("D", {"a": 1})
    page = Page(report.html())
    assert page.texts("h2") == ["Part one", "Part two"] and page.texts("h3") == ["T", "C"]
    assert page.texts("p", "prose") == ["Some words."] and len(page.all("div", "half")) == 1


# ---- tables --------------------------------------------------------------------------------------------------------------


def cells(columns, rows, **more):
    page = Page(data_table(columns, rows, **more))
    flat = [(e["text"], e.get("data-v"), e.get("class")) for e in page.all("td")]
    return [flat[i : i + len(columns)] for i in range(0, len(flat), len(columns))]


def test_numbers_share_decimals_and_align_and_sort_by_their_value():
    found = cells(["name", "score", "count"], [["a", 0.5, 1200], ["b", 0.91239, 7], ["c", None, 3], ["d", math.nan, 4]])
    assert [row[1] for row in found] == [
        ("0.5000", "0.5", "num"), ("0.9124", "0.91239", "num"), ("–", None, "num"), ("–", None, "num"),
    ]  # fmt: skip
    assert [row[2][0] for row in found] == ["1,200", "7", "3", "4"]
    assert found[0][0] == ("a", None, None)
    assert [row[0][0] for row in cells(["s"], [[4.5], [33.1]])] == ["4.5", "33.1"]
    assert [row[0][0] for row in cells(["lr"], [[1e-5], [0.5], [-20000.0]])] == ["1e-5", "0.5", "−20,000"]
    assert [row[0][0] for row in cells(["np"], [[np.float32(0.25)], [np.int64(3)]])] == ["0.25", "3.00"]
    assert [row[0][0] for row in cells(["mixed"], [[True], [0.5], ["x"], [None], [math.inf]])] == [
        "yes",
        "0.5",
        "x",
        "–",
        "inf",
    ]


def test_intervals_and_best_values():
    interval = SimpleNamespace(value=0.75, low=0.7, high=0.8123)
    found = data_table(["m"], [[interval], [0.6], [0.75]], best={"m": "max"})
    page = Page(found)
    assert page.texts("small") == ["0.7000 to 0.8123", "", ""]
    assert page.texts("b") == ["0.7500", "0.7500"], "equals are both best"
    assert Page(data_table(["m"], [[3], [1]], best={"m": "min"})).texts("b") == ["1"]
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        data_table(["a", "b"], [[1]])


def test_confusion_shows_counts_shares_recall_and_precision():
    page = Page(confusion_table([[30, 10], [0, 5]], ["cat", "dog"]))
    td = page.all("td")
    assert [e["text"] for e in td[:3]] == ["30", "10", "75.0%"]
    assert [e["style"] for e in td[:2]] == ["--p:0.750", "--p:0.250"]
    assert td[1]["title"] == "true cat, predicted dog: 10 of 40 (25.0%)"
    assert "dark" in td[0]["class"] and td[3]["class"] == "zero"
    assert [e["text"] for e in page.all("td", "foot")] == ["100.0%", "33.3%"]
    with pytest.raises(DataError, match=r"shape \(2, 2\) for 3 classes\n  fix: one row and column a class"):
        confusion_table([[1, 2], [3, 4]], ["a", "b", "c"])
    empty = Page(confusion_table([[0, 0], [0, 5]], ["cat", "dog"]))
    assert empty.all("td")[2]["text"] == "–"


def test_a_large_confusion_is_a_picture_and_its_worst_pairs():
    matrix = np.eye(60, dtype=int) * 9
    matrix[3, 50] = 7
    page = Page(confusion_table(matrix, [f"c{i}" for i in range(60)]))
    (image,) = page.all("img")
    assert Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).size == (60, 60)
    assert page.texts("td") == ["c3", "c50", "7", "43.8%"]


# ---- charts --------------------------------------------------------------------------------------------------------------


def paths(markup, cls="wide"):
    """d attributes of the lines in the wide (or narrow) drawing."""
    svg = next(part for part in str(markup).split("<svg")[1:] if f'class="{cls}"' in part.split(">")[0])
    return re.findall(r'<path class="(line[^"]*)" d="([^"]*)"', svg)


def coordinates(d):
    return [tuple(map(float, point)) for point in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", d)]


def test_a_line_has_every_point_in_order_and_both_drawings():
    chart = line_chart({"a": [(i, i * i) for i in range(50)]}, title="T", x="step", y="value")
    page = Page(chart)
    assert [e["class"] for e in page.all("svg")] == ["wide", "narrow"]
    for size in ("wide", "narrow"):
        ((style, d),) = paths(chart, size)
        points = coordinates(d)
        assert style == "line c0" and len(points) == 50
        assert all(b[0] > a[0] and b[1] <= a[1] for a, b in itertools.pairwise(points)), "x rightwards, larger y higher"
    svg = page.all("svg")[0]
    assert svg["role"] == "img" and page.texts("title")[0] == "T"
    assert "a: 50 points, from 0 at step 0 to 2,401 at 49, lowest 0, highest 2,401" in page.texts("desc")[0]
    assert any(text == "a: 2,401 at 49" for text in page.texts("title"))
    assert "step" in page.texts("text") and "value" in page.texts("text")


def test_positions_are_proportional():
    ((_, d),) = paths(line_chart({"a": [(0, 0), (5, 5), (10, 10)]}, title="T"))
    (x0, y0), (x1, y1), (x2, y2) = coordinates(d)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    ((_, d),) = paths(line_chart({"a": [(1, 1e-4), (10, 1e-2), (100, 1)]}, title="T", log_x=True, log_y=True))
    (x0, y0), (x1, y1), (x2, y2) = coordinates(d)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11) and y0 - y1 == pytest.approx(y1 - y2, abs=0.11)


def test_missing_values_break_the_line_and_bands_are_drawn():
    ((_, d),) = paths(
        line_chart({"a": [(0, 1), (1, math.nan), (2, 1), (3, None), (4, math.inf), (5, 2), (6, 3)]}, title="T")
    )
    assert d.count("M") == 3 and d.count("L") == 1
    chart = line_chart(
        {"a": [(0, 1, 0.5, 1.5), (1, 2, 1, 3)], "b": [(0, 1, math.nan, math.nan), (1, 1, None, None)]}, title="T"
    )
    (corners,) = set(re.findall(r'<polygon class="band c0" points="([^"]*)"', str(chart).split("</svg>")[0]))
    assert len(corners.split()) == 4
    assert "Nothing to draw" in line_chart({"a": [(0, math.nan)]}, title="T")
    assert "Nothing to draw" in line_chart({}, title="T")
    ((_, d),) = paths(line_chart({"a": [(0, 0), (1, 1), (2, 10)]}, title="T", log_y=True))
    assert len(coordinates(d)) == 2, "what a log axis cannot show is left out"


def test_long_lines_are_thinned_but_keep_their_spikes():
    points = [(i, 100.0 if i == 61_234 else math.sin(i / 5000)) for i in range(100_000)]
    ((_, d),) = paths(line_chart({"a": points}, title="T"))
    drawn = coordinates(d)
    assert 100 < len(drawn) <= MOST_POINTS
    assert min(y for _, y in drawn) < 40, "the spike reaches the top of the chart"
    assert all(b[0] >= a[0] for a, b in itertools.pairwise(drawn))


def test_noise_is_smoothed_in_front_and_kept_behind():
    rng = np.random.default_rng(0)
    noisy = {"loss": [(i, 1 + rng.normal()) for i in range(300)]}
    assert [style for style, _ in paths(line_chart(noisy, title="T", smooth=True))] == ["line c0 faint", "line c0"]
    assert len(paths(line_chart(noisy, title="T"))) == 1
    straight = {"lr": [(i, 300.0 - i) for i in range(300)]}
    assert len(paths(line_chart(straight, title="T", smooth=True))) == 1
    values = [y for _, y in running_mean([(0, 3.0), (1, 0.0), (2, 3.0), (3, 0.0)], 3)]
    assert values == [1.5, 2.0, 1.0, 1.5]


def test_legends_and_labels():
    two = line_chart({"a": [(0, 1), (1, 2)], "b": [(0, 1), (1, 2)]}, title="T")
    page = Page(two)
    assert page.all("ul", "legend")[0]["class"] == "legend narrow", "in a wide place names stand beside the lines"
    assert "a 2" in page.texts("text", "label") and "b 2" in page.texts("text", "label")
    ys = [float(e["y"]) for e in page.all("text", "label")]
    assert abs(ys[0] - ys[1]) >= 14, "labels of lines that end together do not overlap"
    nine = Page(line_chart({f"s{i}": [(0, i), (1, i)] for i in range(9)}, title="T"))
    assert nine.all("ul", "legend")[0]["class"] == "legend" and len(nine.all("li")) == 9
    assert len(nine.all("i", "dashed")) == 3
    assert not Page(line_chart({"a": [(0, 1)]}, title="T")).all("ul")


def test_labels_spread_within_their_range():
    assert spread([10, 10, 10], 16, 0, 100) == [10, 26, 42]
    assert spread([95, 96, 97], 16, 0, 100) == [68, 84, 100]
    assert spread([], 16, 0, 100) == [] and spread([5], 16, 0, 100) == [5]


def test_bars_lengths_intervals_and_reference():
    chart = bar_chart(
        [("one", 0.5, 0.4, 0.6), ("half", 0.25, None, None), ("down", -0.25)], title="T", reference=("chance", 0.1)
    )
    wide = str(chart).split("</svg>")[0]
    bars = [(float(x), float(w)) for x, w in re.findall(r'class="bar" x="([\d.]+)"[^>]*?width="([\d.]+)"', wide)]
    assert bars[0][1] == pytest.approx(2 * bars[1][1], rel=0.01) and bars[0][0] == bars[1][0]
    assert bars[2][0] + bars[2][1] == pytest.approx(bars[0][0], abs=0.2), "a negative bar ends at zero"
    assert wide.count("whisker") == 1 and "chance 0.1" in wide and wide.count("reference") == 1
    assert "one: 0.5 (0.4 to 0.6)" in wide
    assert "Nothing to draw" in bar_chart([("a", math.nan)], title="T")


def test_scatter_draws_each_finite_point_with_its_hover_text():
    page = Page(
        str(scatter_chart({"cat": [(0, 1, EVIL), (1, 2)], "dog": [(math.nan, 1), (2, 2)]}, title="T")).split("</svg>")[
            0
        ]
        + "</svg></div>"
    )
    assert len(page.all("circle", "dot")) == 3
    assert f"cat: {EVIL}" in page.texts("title") and "cat: 1, 2" in page.texts("title")


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.62, 0.93, ["0.6", "0.7", "0.8", "0.9", "1.0"]),
        (0, 1000, ["0", "200", "400", "600", "800", "1000"]),
        (0, 90_000, ["0", "20k", "40k", "60k", "80k", "100k"]),
        (-3, 4, ["−4", "−2", "0", "2", "4"]),
        (0, 1e-3, ["0", "0.2e-3", "0.4e-3", "0.6e-3", "0.8e-3", "1.0e-3"]),
        (0.5, 0.5, None),
        (0, 0, None),
    ],
)
def test_linear_axes_have_round_ticks_around_the_data(low, high, labels):
    axis = linear_axis(low, high)
    assert axis.low <= low and axis.high >= high and 3 <= len(axis.ticks) <= 8
    assert labels is None or [label.lstrip() for label in axis.labels()] == labels
    assert len(set(axis.labels())) == len(axis.ticks)


@pytest.mark.parametrize(("low", "high"), [(1e-6, 1), (0.3, 0.9), (2, 2), (1, 1e12), (5e-324 * 1e10, 1e300)])
def test_log_axes_cover_the_data(low, high):
    axis = log_axis(low, high)
    assert axis.low <= low * 1.001 and axis.high >= high * 0.999 and 2 <= len(axis.ticks) <= 8
    assert axis.at(low) + 1e-9 >= 0 and axis.at(high) <= 1 + 1e-9


def test_short_numbers():
    assert [short(v) for v in (0, 0.91234, 1234.5, -0.5, 3e-5, -3e-5, 2.5e8, 1)] == [
        "0", "0.9123", "1,234", "−0.5", "3e-5", "−3e-5", "2.5e8", "1",
    ]  # fmt: skip


# ---- pictures ------------------------------------------------------------------------------------------------------------


def test_pictures_are_png_within_the_page():
    report = Report("x")
    small, large = np.arange(64, dtype=np.uint8).reshape(8, 8), np.zeros((900, 450, 3), np.uint8)
    report.pictures("P", [[(small, "small"), (large, "large")]])
    one, two = Page(report.html()).all("img")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(one["src"].split(",")[1])))), small)
    assert one["class"] == "crisp" and "class" not in two, "small pictures are enlarged without blur"
    assert (two["width"], two["height"]) == ("320", "640") and (one["alt"], two["alt"]) == ("small", "large")
    with pytest.raises(DataError, match="must be uint8, got float32"):
        report.pictures("P", [[(np.zeros((4, 4), np.float32), "x")]])


def test_captions_that_every_row_repeats_become_column_heads():
    picture = np.zeros((8, 8), np.uint8)
    report = Report("x")
    report.pictures("P", [[(picture, "image"), (picture, "masked")] for _ in range(2)])
    page = Page(report.html())
    assert page.texts("div", "head") == ["image", "masked"] and not page.all("figcaption")
    assert [e["alt"] for e in page.all("img")] == ["image", "masked"] * 2
    report = Report("x")
    report.pictures("P", [[(picture, "a"), (picture, "b")], [(picture, "c")]], columns=["L", "R"])
    page = Page(report.html())
    assert page.texts("div", "head") == ["L", "R"] and page.texts("figcaption") == ["a", "b", "c"]


# ---- reports of runs -----------------------------------------------------------------------------------------------------


def make_run(path, lr=1e-3, *, finished=True, accuracy=0.8):
    with RunFolder(path) as folder:
        config = {"model": "vit_tiny_patch16_224", "data": "/data/scans", "out": str(path), "lr": lr, "workers": 0}
        folder.claim(config, "adapt.lora", command=f"vitkit adapt lora --lr {lr}")
        for step in range(1, 31):
            folder.log({"step": step, "epoch": step / 10, "loss": 1 / step, "lr": lr, "img_per_s": 400.0 + step})
            if step % 10 == 0:
                folder.log(
                    {
                        "step": step,
                        "epoch": step / 10,
                        "val_loss": 1.1 / step,
                        "val_accuracy": 0.5 + step / 100,
                        "val_mean_auc": 0.6,
                    }
                )
        folder.save_pictures("Mistakes", [[(np.zeros((16, 16), np.uint8), f"{EVIL} 99%")]], note="the worst")
        if finished:
            metrics = [
                {"name": "accuracy", "value": accuracy, "low": 0.75, "high": 0.85, "n": 500, "split": "test"},
                {"name": "macro_f1", "value": 0.7, "low": None, "high": None, "n": 500, "split": "test"},
            ]
            folder.finish(
                {
                    "verb": "adapt", "method": "lora", "verdict": "Accuracy 80%.", "metrics": metrics,
                    "tables": [{"title": "Each label", "columns": ["label", "AUC"], "rows": [[EVIL, 0.9]], "note": "n"}],
                    "confusion": {"classes": ["cat", EVIL], "matrix": [[5, 1], [2, 3]]},
                    "trained_parameters": 147_456, "total_parameters": 22_056_576, "seconds": 731.2, "steps": 30,
                }
            )  # fmt: skip
    return RunFolder(path)


def test_report_of_a_run(tmp_path):
    path = run_report(make_run(tmp_path / "lora"))
    assert path == tmp_path / "lora" / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.texts("h1") == ["adapt · lora"] and page.texts("p", "subtitle") == ["vit_tiny_patch16_224 on scans"]
    assert page.texts("p", "verdict") == ["Accuracy 80%."]
    assert page.texts("h2") == ["Results", "Pictures", "Training", "How it was run"]
    assert page.texts("h3") == [
        "Final figures", "Confusion", "Each label", "Mistakes", "Loss", "Validation", "Learning rate",
    ]  # fmt: skip
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["accuracy"] == "0.80 0.75 to 0.85, 500 test images" and facts["macro F1"].startswith("0.7 ")
    assert facts["trained weights"] == "147 k 0.67% of 22.1 M" and facts["time"].startswith(
        "12 min 11 s 30 steps, 415.5 images/s"
    )
    loss = next(part for part in html.split("<h3>") if part.startswith("Loss"))
    assert [len(coordinates(d)) for _, d in paths(loss)] == [30, 3]
    assert "training" in loss and "validation" in loss
    assert "Medians while training: images a second: 415.5." in html
    assert EVIL not in html
    assert page.texts("summary") == ["Settings", "Figures", "Environment"]
    assert run_report(RunFolder(path.parent)).read_text(encoding="utf-8") == html, "writing it again changes nothing"


def test_report_of_an_unfinished_run_and_of_no_run(tmp_path):
    page = Page(run_report(make_run(tmp_path / "a", finished=False)).read_text())
    assert page.texts("p", "verdict") == ["Not finished: 30 steps so far. The same command resumes it."]
    assert "Loss" in page.texts("h3") and not page.all("dl")
    with RunFolder(tmp_path / "b") as folder:
        folder.claim({}, "evaluate")
    page = Page(run_report(folder).read_text())
    assert page.texts("h1") == ["evaluate"] and page.texts("h2") == ["How it was run"]
    with pytest.raises(ConfigError, match="there is no vitkit run in"):
        run_report(RunFolder(tmp_path / "c"))


def test_comparison_of_runs(tmp_path):
    runs = [
        make_run(tmp_path / "x" / "lora"),
        make_run(tmp_path / "y" / "lora", lr=3e-3, accuracy=0.9),
        make_run(tmp_path / "z" / "lora", finished=False),
    ]
    extra = {"title": "Paired", "columns": ["difference"], "rows": [[0.1]], "note": "same images"}
    path = compare_report(runs, tables=[extra])
    assert path == tmp_path / "x" / "compare.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.texts("p", "subtitle") == ["x/lora, y/lora, z/lora"]
    assert page.texts("p", "verdict") == ["3 runs side by side; one setting differs."]
    assert page.texts("h2") == ["Results", "Settings that differ", "Training", "Every setting"]
    differ = html.split("Settings that differ</h2>")[1].split("</table>")[0]
    assert re.findall(r"<td>([^<]*)</td>", differ) == ["lr", "0.001", "0.003", "0.001"], (
        "the folder itself is no setting"
    )
    results = html.split("Final figures")[1].split("</table>")[0]
    row = Page("<table><tr>" + results.split("<tbody><tr>")[1].split("</tr>")[0] + "</tr></table>").texts("td")
    assert row[0] == "accuracy" and row[2].startswith("0.8") and row[3].startswith("0.9") and row[4] == "–"
    assert "Paired" in page.texts("h3")
    loss = next(part for part in html.split("<h3>") if part.startswith("Loss"))
    assert [len(coordinates(d)) for _, d in paths(loss)] == [30, 30, 30]
    same = compare_report(runs[::2], tmp_path / "same.html", verdict="They agree.")
    assert "None: the runs have the same settings." in same.read_text() and "They agree." in same.read_text()
