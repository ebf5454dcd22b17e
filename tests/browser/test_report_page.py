"""The page of a run with planted faults, in a browser: drawing, selection, rows as data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from made_runs import BROKEN, EVIL, SPIKE, write_run

from glassloop.report.writing import write_report

OpenPage = Callable[..., object]
FIGURES = (
    "loss",
    "norm",
    "clip",
    "lr",
    "cosine",
    "noise",
    "ratio",
    "unmoved",
    "tokens",
    "padding",
    "time",
    "clock",
    "power",
    "heat",
    "busy",
    "host-gib",
)
# Pixels that are drawn on.
INK = """id => {
  const c = document.querySelector(`#${id} .plot canvas`);
  const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n }"""

# [contrast as WCAG defines it, where] of all text but that of mixed backgrounds.
CONTRASTS = """() => {
  const linear = x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const light = c => {
    const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => linear(x / 255));
    return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2];
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)|transparent/.test(c)) return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const texts = 'h1, h2, .how, .quiet, .tag, th, td, .legend button, .link, .k, .v, code';
  const seen = [...document.querySelectorAll(texts)];
  return seen.filter(e => e.innerText?.trim() && behind(e).startsWith('rgb')).map(e => {
    const a = light(getComputedStyle(e).color), b = light(behind(e));
    const where = `${e.className} ${e.innerText.slice(0, 30)}`;
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), where];
  });
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_run(tmp_path_factory.mktemp("runs") / "planted"))


@pytest.fixture
def opened(open_page, report: Path):
    return open_page(report)


def select(opened, update: int) -> None:
    """By the slider, as a person would drag it."""
    opened.page.locator("#slider").fill(
        str(update)
    )  # the page begins with update 0, so place and update are alike


def test_every_panel_is_drawn_and_nothing_complains(opened) -> None:
    for name in FIGURES:
        assert opened.js(f"({INK})('{name}')") > 2000, name
        assert opened.text(f"#{name} h2").strip(), name
    assert opened.page.locator("#heat canvas[role=img]").count() == 2
    assert "no GPU" in opened.text("#memory")
    assert opened.complaints == []


def test_neighbouring_ticks_of_small_numbers_have_different_labels(opened) -> None:
    labels = opened.js("[5e-5, 1e-4, 1.5e-4, 2e-4, 2.5e6, 0].map(tick)")
    assert labels == ["5e-5", "1e-4", "1.5e-4", "2e-4", "2.5e6", "0"]


def test_a_rank_looks_the_same_in_every_figure(opened) -> None:
    """Colour and dash, in the legends."""
    looks = opened.js(
        """[...document.querySelectorAll('.legend button')].map(b =>
             [b.innerText.trim().slice(0, 6), b.querySelector('canvas').toDataURL()])
           .filter(([name]) => name.startsWith('rank '))"""
    )
    assert len(looks) >= 16  # two ranks in loss, norm, padding and five figures of the machine
    assert len({tuple(one) for one in looks}) == 2


def test_nothing_is_asked_of_a_network(opened) -> None:
    assert opened.requests == []
    assert opened.js("performance.getEntriesByType('resource').length") == 0


def test_the_policy_refuses_what_the_page_does_not_hold(opened) -> None:
    refused = opened.js(
        """() => new Promise(done => {
           document.addEventListener('securitypolicyviolation', e => done(e.effectiveDirective));
           const s = document.createElement('script');
           s.textContent = 'window.hacked = 3'; document.body.append(s);
           setTimeout(() => done(null), 500) })"""
    )
    assert refused == "script-src-elem"
    assert (
        opened.js("fetch('data:text/plain,x').then(() => 'loaded', () => 'refused')") == "refused"
    )
    assert opened.js("window.hacked") is None


def test_the_summary_says_what_happened(opened) -> None:
    said = opened.text("#said")
    assert (
        "It learned" in said
        and f"first update {BROKEN}" in said
        and f"first at update {SPIKE}" in said
    )
    assert "train:evil cost" in said


def test_a_selected_update_is_followed_by_every_panel(opened) -> None:
    for update in (8, 20):
        select(opened, update)
        record = opened.js(
            "readRun(JSON.parse(document.getElementById('data').textContent))"
            f".columns.loss[{update - 1}]"
        )
        shown = opened.js(f"show({record})")
        assert f"Update {update} of 40" in opened.text("#chosen")
        assert shown in opened.text("#detail"), "detail"
        assert opened.page.locator("#loss .value").first.inner_text() == shown
        assert f"update {update}:" in opened.text("#heat .readout")
        assert opened.js("board.chosen") == update
        for name in FIGURES:
            assert f"update {update}:" in opened.page.locator(f"#{name} .plot").get_attribute(
                "aria-label"
            ), name
    assert opened.page.locator("#evaluation-list tr.now").first.inner_text().startswith("20")


def test_a_click_in_a_figure_a_map_and_a_table_selects(opened) -> None:
    figure = opened.page.locator("#norm .u-over")
    box = figure.bounding_box()
    figure.click(position={"x": box["width"] * 0.5, "y": 40})
    assert opened.js("board.chosen") == 20
    canvas = opened.page.locator("#heat canvas[role=img]").nth(1)
    box = canvas.bounding_box()
    canvas.click(position={"x": box["width"] - 3, "y": 20})
    assert opened.js("board.chosen") == 40
    opened.page.locator("#event-list tr", has_text="loss_spike").first.click()
    assert opened.js("board.chosen") == SPIKE


def test_a_mark_opens_the_detail_with_the_command_to_type(opened) -> None:
    select(opened, 1)
    opened.page.locator("#mark-after").click()
    opened.page.locator("#mark-after").click()
    assert opened.js("board.chosen") == SPIKE
    assert f"--update {SPIKE} --bisect" in opened.text("#detail")
    opened.page.locator("#mark-after").click()
    detail = opened.text("#detail")
    assert (
        opened.js("board.chosen") == BROKEN and "Not applied" in detail and "not a number" in detail
    )
    assert f"--update {BROKEN} --bisect" in detail


def test_the_time_of_an_update_is_told_apart(opened) -> None:
    select(opened, 5)
    told = opened.page.locator("#detail .strip").get_attribute("aria-label")
    assert (
        told == "compute 1 s, wait for other ranks 0.2500 s, gate 0.3500 s, reduce 0.2000 s, "
        "optimizer 0.1000 s, the rest 0.1000 s"
    )
    widths = opened.js(
        "[...document.querySelectorAll('#detail .strip span')]"
        ".map(e => e.getBoundingClientRect().width)"
    )
    assert [width / sum(widths) for width in widths] == pytest.approx(
        [0.5, 0.125, 0.175, 0.1, 0.05, 0.05], abs=0.002
    )
    assert [
        row.split()[-2:]
        for row in opened.text("#detail").splitlines()
        if row.startswith("rank ") and row[5].isdigit()
    ] == [
        ["1", "0.2500"],
        ["1.250", "0"],
    ]


def test_the_keyboard_is_enough(opened) -> None:
    select(opened, 10)
    opened.page.locator("#loss .plot").focus()
    outline = opened.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "the focus is seen"
    for key, update in (
        ("ArrowRight", 11),
        ("ArrowLeft", 10),
        ("n", 11),
        ("n", SPIKE),
        ("p", 11),
        ("End", 40),
        ("Home", 0),
    ):
        opened.page.keyboard.press(key)
        assert opened.js("board.chosen") == update, key
    canvas = opened.page.locator("#heat canvas[role=img]").first
    canvas.focus()
    before = opened.text("#heat .readout")
    opened.page.keyboard.press("ArrowDown")
    assert opened.text("#heat .readout") != before
    row = opened.page.locator("#event-list tr", has_text="loss_spike").first
    row.focus()
    opened.page.keyboard.press("Enter")
    assert opened.js("board.chosen") == SPIKE


def test_a_row_with_markup_stays_text(opened) -> None:
    select(opened, SPIKE)
    opened.page.locator("#worst summary").first.click()
    assert EVIL in opened.js("document.getElementById('worst').textContent")
    assert EVIL in opened.js("document.getElementById('answers').textContent")
    assert opened.js("window.hacked") is None
    assert (
        opened.page.locator("main img").count() == 0
        and opened.page.locator("main b", has_text="bold").count() == 0
    )


def test_what_does_not_exist_is_absent_and_never_0(opened) -> None:
    select(opened, 2)
    assert opened.page.locator("#noise .value").first.inner_text() == "–"
    select(opened, BROKEN)
    assert opened.page.locator("#clip .value").first.inner_text() == "–"
    assert opened.page.locator("#norm .value").first.inner_text() == "not a number"
    opened.page.locator("#quantity").select_option("update_to_weight")
    select(opened, 1)
    opened.js("heat.matrix = 1; outline()")  # B, which was 0
    assert opened.text("#heat .readout").endswith("–")
    opened.page.locator("#quantity").select_option("grad_norm")
    opened.js("heat.matrix = 0; outline()")  # A, whose gradient is 0 then
    assert opened.text("#heat .readout").endswith(" 0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(open_page, report: Path, scheme: str) -> None:
    opened = open_page(report, color_scheme=scheme)
    contrasts = opened.js(CONTRASTS)
    worst = min(contrasts)
    assert worst[0] >= 4.5, worst


def test_it_fits_1000_pixels_and_paper(opened) -> None:
    assert opened.js("document.documentElement.scrollWidth") <= 1000
    opened.js("dispatchEvent(new Event('beforeprint'))")
    assert opened.js("document.documentElement.dataset.theme") == "light"
    assert (
        opened.js(
            "Math.max(...[...document.querySelectorAll('.panel')]"
            ".map(e => e.getBoundingClientRect().width))"
        )
        <= 703
    )  # A4 less margins
    assert opened.js(
        "[...document.querySelectorAll('.scroll')].every(e => e.scrollHeight <= e.clientHeight + 1)"
    ), "paper does not scroll"
    opened.js("dispatchEvent(new Event('afterprint'))")
    assert opened.page.pdf(format="A4")[:4] == b"%PDF"


def test_without_text_nothing_of_a_row_is_left(open_page, tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "planted"), tmp_path / "shared.html", text=False)
    raw = path.read_text(encoding="utf-8")
    for secret in (
        "hacked",
        "train:",
        "asks for a code",
        "adapter says",
        "Is it a scam",
        "Secret system",
    ):
        assert secret not in raw, secret
    opened = open_page(path)
    assert "left out" in opened.text("#answers") and opened.complaints == []


@pytest.mark.parametrize(
    "made",
    [
        {"updates": 0},
        {"updates": 1, "ranks": 1},
        {"updates": 4, "end": None, "text": "none"},
        {"updates": 6, "ranks": 8},
    ],
)
def test_a_run_that_has_hardly_begun_or_many_ranks_is_shown_too(
    open_page, tmp_path: Path, made: dict
) -> None:
    folder = write_run(tmp_path / "run", faults=False, **made)
    if not made["updates"]:
        (folder / "evaluations.jsonl").unlink()
    opened = open_page(write_report(folder))
    assert opened.complaints == []
    if made["updates"]:
        opened.page.keyboard.press("ArrowLeft")
        assert opened.complaints == []


@pytest.mark.thorough
def test_5000_updates_of_448_matrices_are_small_and_quick(open_page, tmp_path: Path) -> None:
    path = write_report(
        write_run(tmp_path / "big", updates=5000, layers=32, probe_every=5, rows=600)
    )
    assert path.stat().st_size < 15e6
    opened = open_page(path)
    assert opened.complaints == []
    tries_ms = []
    for _ in range(3):  # the best counts: other processes only make it slower
        tries_ms.append(int(opened.js("document.documentElement.dataset.ready")))
        if tries_ms[-1] < 2000:
            break
        opened.page.reload()
        opened.page.wait_for_selector("html[data-ready]", timeout=20_000, state="attached")
    assert min(tries_ms) < 2000, f"interactive after {tries_ms} ms"
    opened.page.keyboard.press("ArrowRight")
    assert "of 5000" in opened.text("#chosen")
