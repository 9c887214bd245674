"""The report page in a real browser, headless: it renders, filters, obeys the keyboard, and runs nothing but itself.

Not part of `python -m pytest`: it needs `pip install -r tests/optional/requirements.txt` and a chromium in PATH. Then

    python -m pytest tests/optional/test_report_browser.py
"""

import itertools
import random
import shutil
import time
import xml.etree.ElementTree

import pytest
from playwright.sync_api import sync_playwright
from test_report import HOSTILE, MISMATCH, STEPS, Pieces, make_run, sample, table_of  # noqa: F401 - make_run is a fixture

from lib import runs
from tools import report

STATUSES = ("kept", "kept", "untouched", "duplicate", "identical", "filtered")


@pytest.fixture(scope="module")
def chromium():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.fail("no chromium in PATH: install one (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens a report. Whatever the test does, afterwards there was no console message, no dialog, no request but the file."""
    contexts, noise, requests = [], [], []

    def go(path, fragment="", width=1280, scheme="light"):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: noise.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("dialog", lambda dialog: (noise.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url.split("#")[0]))
        page.goto(path.as_uri() + fragment)
        page.wait_for_selector("html[data-ready=true]", state="attached")
        page.wait_for_timeout(100)  # charts draw when they know their width
        return page

    yield go
    for context in contexts:
        context.close()
    assert noise == []
    assert all(url.startswith("file:") and url.endswith("/report.html") for url in requests), requests


def records(prompts, samples=3, length=12):
    """Random records of several statuses; prompt 1 has one sample."""
    random.seed(0)
    found = []
    for i, k in itertools.product(range(prompts), range(samples)):
        status = "untouched" if i == 1 else STATUSES[(i * samples + k) % len(STATUSES)]
        n = random.randint(3, length)
        t = -1 if status == "untouched" else random.randrange(n)
        student = [round(-random.random(), 4) for _ in range(n)]
        teacher = [round(q - (0.1 if t < 0 or p < t else 4.5 + random.random()), 4) for p, q in enumerate(student)]
        ids = [random.randint(3, 16) for _ in range(n)]
        record = sample(i, k, status, t, response_ids=ids, student_logprobs=student, teacher_logprobs=teacher)
        chosen, values = (ids, teacher) if t < 0 else (ids[:t] + [17, 2], teacher[:t] + [-0.1, -0.2])
        record |= {"chosen_ids": chosen, "chosen_teacher_logprobs": values, "prefix_len": t if t >= 0 else n}
        found += [record] * (i != 1 or k == 0)
    return found


FILES = {
    "mismatch.json": MISMATCH,
    "metrics.jsonl": STEPS,
    "summary.json": {"student before": {"accuracy": 0.4}, "student after": {"accuracy": 0.5}},
}


@pytest.fixture
def make_arms(make_run):  # noqa: F811
    """{arm: number of seeds} -> the page about such runs of KD, with samples, scores on the way and a closing table."""

    def make(arms, **options):
        outs = []
        for k, seed in [(k, seed) for k, seeds in enumerate(arms.values()) for seed in range(seeds)]:
            name = f"{len(arms)}-{seed}/{list(arms)[k]}"
            steps = [{"stage": "kd", "step": n, "loss": 1 / n, "ce": 0.5, "kd": 0.1, "lr": 1e-4} for n in range(1, 61)]
            files = {"metrics.jsonl": [row | {"tokens": 1000} for row in steps], "mismatch.json": MISMATCH}
            files["summary.json"] = {"student before": {"accuracy": 0.4}}
            files["summary.json"]["student after"] = {"accuracy": 0.5 + k / 10 + seed / 100}
            out = make_run(name, records(5), files)
            args = {"student": "S", "teacher": "T", "data": "D", "seed": seed, "kd_rate": 0.5, "eta": 4.0}
            args["out"] = str(out)
            runs.write_json(out / "args.json", {"args": args})
            (out / "eval").mkdir()
            table = table_of({out / f"students/step-{n:06d}": n / 2 + 9 * k + seed for n in (20, 40, 60)})
            runs.write_json(out / "eval" / "table.json", table)
            outs.append(out)
        return report.write_report(*outs, **options)

    return make


@pytest.fixture
def ordinary(make_run):  # noqa: F811
    return report.write_report(make_run(records=records(20), files=FILES))


def open_all(page):
    """Opens what is folded in; a table in it is built now."""
    page.locator("details").evaluate_all("all => all.forEach((details) => { details.open = true; })")
    page.wait_for_timeout(100)


def title(page):
    return page.locator("#sample h3").first.inner_text()


# ---------------------------------------------------------------------------------------------------------------------
# What is there
# ---------------------------------------------------------------------------------------------------------------------


def test_a_sample_and_its_tokens(visit, make_run, tokenizer):  # noqa: F811
    page = visit(report.write_report(make_run(records=[sample(), sample(0, 1, "untouched", -1)], files=FILES)))
    assert title(page).startswith("Prompt 0, sample 0") and "kept" in title(page)
    student, teacher = (page.locator(".tokens").nth(k).locator("button") for k in (0, 1))
    for buttons, ids in ((student, (5, 6, 7, 8, 2)), (teacher, (5, 6, 9, 2))):
        assert buttons.all_inner_texts() == [tokenizer.decode([i]) for i in ids]
    assert [b.get_attribute("class").split()[0] for b in teacher.all()] == ["shared", "shared", "teacher", "teacher"]
    first = student.nth(2)
    assert {"first", "over"} <= set(first.get_attribute("class").split())
    assert "margin +5.700, t star, the first mismatch" in first.get_attribute("aria-label")
    first.hover()
    tip, expected = page.locator("#tip"), "position 2 log q −0.300 log p −6.000 margin +5.700 token id 7"
    assert " ".join(tip.inner_text().split()).endswith(expected)
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    mixes = student.evaluate_all("all => all.map(b => parseFloat(b.style.getPropertyValue('--mix')))")
    assert max(mixes) == mixes[2] > 50 and mixes[0] < 2  # the shade follows the margin
    page.get_by_text("Every token as a table").click()
    assert page.locator("tr.differs").inner_text().split("\t")[2:5] == ["−0.300", "−6.000", "+5.700"]
    page.click("#next")
    assert "untouched" in title(page) and "the teacher writes nothing" in page.locator(".tokens").nth(1).inner_text()


def test_charts(visit, ordinary):
    page = visit(ordinary)
    titles = page.locator("figcaption").all_inner_texts()
    assert {"Replacement rate, samples", "Where the first mismatch is", "Loss of DPO", "Reward margin"} <= {*titles}
    assert page.locator("#mismatch .marktext").evaluate_all("all => all.map(t => t.textContent)") == ["η = 4"] * 3
    labels = page.locator("svg[role=img]").evaluate_all("all => all.map(svg => svg.getAttribute('aria-label'))")
    assert len(labels) == len(titles) + 1 and all(labels)  # and the margins of the sample
    wrong = "all => all.flatMap(e => [...e.attributes]).filter(a => /NaN|undefined|Infinity/.test(a.value)).length"
    assert page.locator("svg, svg *").evaluate_all(wrong) == 0
    page.locator("#training").scroll_into_view_if_needed()
    box = page.locator("#training svg").first.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 80)
    assert page.locator("#training .readout").first.inner_text() == "step 3: 0.2333"
    page.locator("#training details summary").first.click()
    page.locator("#training table tbody tr").nth(2).wait_for()  # the table is built when it is opened
    assert page.locator("#training table tbody tr").count() == 3
    assert "40.0% → 50.0%" in page.locator("#overview").inner_text()


def test_parts_of_a_run(visit, make_run):  # noqa: F811
    """A run of kd.py has no samples; one that has not trained no curves; samples that are left out are counted."""
    steps = [{"stage": "kd", "step": k, "loss": 0.1, "ce": 0.2, "kd": 0.3} for k in (1, 2)]
    page = visit(report.write_report(make_run("kd", files={"metrics.jsonl": steps})))
    assert page.locator("#samples").count() == 0 and page.locator("#training figure").count() == 1
    page = visit(report.write_report(make_run("early", records(20)), max_samples=10))
    assert page.locator("#training, #mismatch").count() == 0
    assert "48 of 58 samples are left out" in page.locator("#samples").inner_text()


def test_two_runs(visit, make_run):  # noqa: F811
    first = make_run("one", [sample(), sample(0, 1)], FILES)
    second = make_run("two", [sample(), sample(3)], FILES)
    page = visit(report.write_report(first, second))
    assert page.locator("#sample article").count() == 2  # the same sample of both
    page.click("#next")
    assert page.locator("#sample article").count() == 1 and "no such sample" in page.locator("#sample").inner_text()
    page.select_option("#run", label="B two")
    page.click("#next")
    assert "Prompt 3" in title(page) and page.url.endswith("#B-p3-s0")
    page.select_option("#beside", label="none")
    assert page.locator("#sample article").count() == 1
    assert "Prompt 3" in title(visit(first / "report.html", "#B-p3-s0"))


STROKES = """root => [...document.querySelectorAll(root + " .curve")].map(e => e.getAttribute("stroke") + " " + e.getAttribute("stroke-dasharray"))"""


def test_a_color_is_an_arm_and_a_dash_a_quantity(visit, make_arms):
    page = visit(make_arms({"kd": 2, "warm": 1}))
    colors = {arm: f"var(--series{k})" for k, arm in enumerate(("kd", "warm"))}
    kd, warm = colors.values()
    assert page.evaluate(STROKES, "#training figure:nth-child(1)") == [
        f"{color} {dash}" for dash in ("", "7 4", "2 3") for color in (kd, kd, warm)
    ]
    assert page.evaluate(STROKES, "#progress figure:nth-child(1)") == [f"{color} " for color in (kd, kd, warm)]
    assert page.locator("#training .legend").first.inner_text().split() == ["loss", "CE", "KD"]
    keys = page.locator("#training .runs .check")
    assert keys.all_inner_texts() == ["A kd, seed 0", "B kd, seed 1", "C warm"]
    assert [line.get_attribute("stroke") for line in keys.locator("line").all()] == [kd, kd, warm]
    rows = page.locator("#arms table").first.locator("tbody tr")
    assert [row.locator("line").get_attribute("stroke") for row in rows.all()] == [kd, warm]
    keys.nth(2).click()  # one click, and the run is gone from all charts
    for section in ("#training", "#progress"):
        assert warm not in " ".join(page.evaluate(STROKES, section))
        assert not page.locator(f"{section} [data-run='2']").is_checked()


def test_arms_table(visit, make_arms):
    page = visit(make_arms({"kd": 3, "warm": 3}))
    text = page.locator("#arms").inner_text()
    [base, warm] = [row.inner_text().split("\t") for row in page.locator("#arms table").first.locator("tbody tr").all()]
    assert base == ["kd", "3", "51.00", "1.00", "", "", "", "60K", "60K"]
    # Each seed of the second arm is 10 above that of the first: the interval has no width
    assert warm == ["warm", "3", "61.00", "1.00", "+10.00", "+10.00 to +10.00", "3", "60K", "60K"]
    assert "One seed is no evidence" not in text
    page.locator("#arms summary").click()
    assert "Not counted: the reference model" in page.locator("#arms").inner_text()
    page = visit(make_arms({"one": 1}))
    assert "One seed is no evidence" in page.locator("#arms").inner_text()


def test_arguments_that_differ_come_first(visit, make_arms):
    page = visit(make_arms({"kd": 2}))
    assert page.locator("#arguments tbody th").first.inner_text() == "--seed"
    assert (
        page.locator("#arguments tr.differs").count() == 1 and "first, 1 of " in page.locator("#arguments").inner_text()
    )


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("count", [3, 12])
def test_many_runs(visit, make_arms, count, scheme, width):
    """Every text can be read, nothing is wider than the screen, no curve has a hole that is drawn."""
    page = visit(make_arms({f"arm-{k}": 3 for k in range(count // 3)}), width=width, scheme=scheme)
    assert page.locator("#run option").count() == count == page.locator("#overview tbody tr").count()
    page.select_option("#run", index=count - 1)
    assert page.url.count("#") == 0 or page.url.endswith("-p0-s0")
    page.click("#next")
    assert page.url.endswith(f"#{'ABCDEFGHIJKL'[count - 1]}-p0-s1")
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []
    wrong = "all => all.flatMap(e => [...e.attributes]).filter(a => /NaN|undefined|Infinity/.test(a.value)).length"
    assert page.locator("svg, svg *").evaluate_all(wrong) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Finding a sample
# ---------------------------------------------------------------------------------------------------------------------


def test_next_previous_jump_and_fragment(visit, ordinary):
    page = visit(ordinary)
    assert page.locator("#previous").is_disabled()
    for button, number in (("next", 1), ("previous", 0)):
        page.click(f"#{button}")
        assert title(page).startswith(f"Prompt 0, sample {number}") and page.url.endswith(f"#p0-s{number}")
    page.fill("#jump-prompt", "7")
    page.fill("#jump-sample", "2")
    page.get_by_role("button", name="Go", exact=True).click()
    assert title(page).startswith("Prompt 7, sample 2") and page.url.endswith("#p7-s2")
    page.fill("#jump-prompt", "99")
    page.keyboard.press("Enter")
    assert page.locator("#jump-error").inner_text() == "No sample 2 of prompt 99 in this page."
    assert title(page).startswith("Prompt 7, sample 2")
    page.evaluate("location.hash = '#p3-s1'")
    page.wait_for_function("document.querySelector('#sample h3').textContent.startsWith('Prompt 3, sample 1')")
    for fragment, place in (("p4-s2", (4, 2)), ("p99-s1", (0, 0)), ("%3Cscript%3E", (0, 0)), ("p1", (1, 0))):
        page = visit(ordinary, f"#{fragment}")
        assert title(page).startswith("Prompt {}, sample {}".format(*place))
    page.locator("#list a").nth(5).click()
    current = page.locator("#list a[aria-current]")
    assert current.count() == 1 and page.url.endswith(current.get_attribute("href"))


def test_filters(visit, ordinary):
    page, found = visit(ordinary), records(20)
    replaced = [r for r in found if r.get("t_star", -1) >= 0]
    margins = [r["student_logprobs"][r["t_star"]] - r["teacher_logprobs"][r["t_star"]] for r in replaced]

    def count(**typed):
        for box, value in typed.items():
            page.fill(f"#{box.replace('_', '-')}", value)
        page.wait_for_timeout(250)  # what is typed is waited for
        return int(page.locator("#matches").inner_text().split()[0])

    assert count() == len(found) == 58
    for box in page.locator("#statuses input").all():
        box.uncheck()
    assert count() == 0 and page.locator("#next").is_disabled()
    page.get_by_label("duplicate").check()
    assert count() == sum(r["status"] == "duplicate" for r in found) and "duplicate" in title(page)
    page.click("#reset")
    assert count(margin_from="5") == sum(m >= 5 for m in margins)
    assert count(margin_to="5.25") == sum(5 <= m <= 5.25 for m in margins)
    page.click("#reset")
    assert count(length_from="4", length_to="6") == sum(4 <= len(r.get("response_ids", ())) <= 6 for r in found)
    page.click("#reset")
    page.select_option("#order", "margin")
    values = [float(text) for text in page.locator("#list a span:nth-child(2)").all_inner_texts()]
    assert values == sorted(values, reverse=True) and len(values) == 20
    page.click("#page-on")
    assert page.locator("#pages").inner_text() == "page 2 of 3"


# ---------------------------------------------------------------------------------------------------------------------
# Keyboard, screen readers, themes, phones
# ---------------------------------------------------------------------------------------------------------------------


def test_keyboard(visit, ordinary):
    page = visit(ordinary)
    label = lambda: page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("#next")
    for key, number in (("Enter", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        page.keyboard.press(key)
        assert title(page).startswith(f"Prompt 0, sample {number}")
    assert "Prompt 0, sample 1" in page.locator("#live").inner_text()  # said to screen readers
    group = page.locator(".tokens").first
    assert group.locator("button[tabindex='0']").count() == 1  # one tab stop
    group.locator("button[tabindex='0']").focus()
    last = group.locator("button").count() - 1  # nothing comes after it
    for key, place in (("Home", 0), ("ArrowRight", 1), ("End", last), ("ArrowRight", last)):
        page.keyboard.press(key)
        assert label().startswith(f"position {place},") and f"position\n{place}" in page.locator("#tip").inner_text()
    page.locator("#list a").first.focus()  # the list is drawn anew for each sample: the focus stays in its place
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_timeout(100)
    assert page.evaluate("document.activeElement === document.querySelector('#list a[aria-current]')")
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement === document.querySelectorAll('#list a')[2]")


def test_everything_has_a_name(visit, ordinary):
    page = visit(ordinary)
    nameless = """() => [...document.querySelectorAll("button, input, select, a, [role=region], [role=group], figure svg[role=img]")].filter(
        (e) => !(e.getAttribute("aria-label") || e.textContent.trim() || (e.labels && e.labels[0]?.textContent.trim()))).map((e) => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    ids = page.locator("[id]").evaluate_all("all => all.map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map(h => Number(h.tagName[1]))")
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    snapshot = page.locator("main").aria_snapshot()
    assert 'button "Next →"' in snapshot and 'spinbutton "margin at t*, from"' in snapshot


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1), ink = canvas.getContext("2d", { willReadFrequently: true });
  const paint = (colors) => { ink.clearRect(0, 0, 1, 1); for (const c of colors) { ink.fillStyle = c; ink.fillRect(0, 0, 1, 1); } return [...ink.getImageData(0, 0, 1, 1).data]; };
  const light = (rgb) => { const [r, g, b] = rgb.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !e.checkVisibility() || e.closest("script, :disabled, option")) continue;
    const layers = [];
    for (let p = e; p; p = p.parentElement) layers.unshift(getComputedStyle(p).backgroundColor);
    const style = getComputedStyle(e), text = e.closest("svg") ? style.fill : style.color;
    const a = light(paint(layers)), b = light(paint([...layers, text]));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${e.tagName}.${e.className.baseVal ?? e.className} ${e.textContent.slice(0, 30)}`);
  }
  return low;
}"""


def test_themes_and_contrast(visit, ordinary):
    """Text has 4.5 to 1 (WCAG 2.2, AA) on its background, the shaded tokens included, in both themes."""
    background, colors = "getComputedStyle(document.body).backgroundColor", {}
    for scheme in ("light", "dark"):
        page = visit(ordinary, scheme=scheme)
        colors[scheme] = page.evaluate(background)
        open_all(page)
        assert page.evaluate(CONTRAST) == []
    assert colors["light"] != colors["dark"]
    page = visit(ordinary)
    for name, color in (*colors.items(), ("system", colors["light"])):
        page.click("#theme")
        page.wait_for_timeout(300)  # storage is written in the background
        page.reload()
        assert page.inner_text("#theme") == f"Theme: {name}" and page.evaluate(background) == color


@pytest.mark.parametrize("width", [320, 768])
def test_narrow_screens_scroll_down_only(visit, make_run, width):  # noqa: F811
    found = [*records(20), sample(50, prompt="w" * 3000)]
    path = report.write_report(make_run("a-name-" + "x" * 120, found, FILES), make_run("two", found, FILES))
    page = visit(path, "#p50-s0", width)
    open_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = "all => all.filter(b => b.checkVisibility() && b.getBoundingClientRect().height < 40).map(b => b.id)"
    assert width > 400 or page.locator("button:not(.tokens button)").evaluate_all(small) == []  # for thumbs


# ---------------------------------------------------------------------------------------------------------------------
# Hostile text, many samples
# ---------------------------------------------------------------------------------------------------------------------


def test_hostile_text_does_nothing(visit, make_run):  # noqa: F811
    """It is shown, as text: no dialog, no title, no element, no request comes of it."""
    tokenizer = Pieces(*((text, text) for text in HOSTILE))
    ids = {"response_ids": [1, 2, 3, 4, 5], "chosen_ids": [1, 2, 6, 6]}
    found = [sample(i, prompt=text, status=HOSTILE[i % 2], **ids) for i, text in enumerate(HOSTILE)]
    files = {**FILES, "summary.json": {HOSTILE[0]: {HOSTILE[1]: 1.0}}}
    path = report.write_report(make_run("</title><script>alert(1)<", found, files, False), tokenizer=tokenizer)
    page = visit(path, "#</script><script>alert(1)</script>")
    for i, text in enumerate(HOSTILE):
        page.evaluate(f"location.hash = '#p{i}-s0'")
        page.wait_for_function(f"document.querySelector('#sample h3').textContent.startsWith('Prompt {i},')")
        open_all(page)
        shown = page.locator("#sample pre").first.inner_text()
        assert text[:4] in shown and not set(shown) & set("\u202e\u200b\u2028\x00\x07")  # named, not obeyed
    assert page.locator("script").count() == 3 and page.locator("main img").count() == 0
    assert "owned" not in page.title() and page.locator(".tokens button").first.inner_text() == HOSTILE[0]


def test_hostile_names_of_many_runs(visit, make_arms, tmp_path):
    """In the folders' names, arguments and sets of three runs: text on the page, no formula and valid XML in the figures."""
    names = ["_</script><img src=x onerror=alert(1)>", "$\\frac{$ \u202eabc\u202c \u200f", "a\x07\n<b>&'"]
    path = make_arms(dict.fromkeys((name.replace("/", "-") for name in names), 1))
    outs = sorted(tmp_path.glob("3-0/*"))
    for out, text in zip(outs, HOSTILE):
        args = runs.read_json(out / "args.json")["args"]
        runs.write_json(out / "args.json", {"args": args | {text: text, "student": f"{text}/student"}})
        table = runs.read_json(out / "eval" / "table.json")
        for row in table["models"].values():
            row["sets"][text] = row["sets"]["gsm8k"] | {"metric": text}
        runs.write_json(out / "eval" / "table.json", table)
        runs.write_jsonl(out / "metrics.jsonl", [*runs.read_jsonl(out / "metrics.jsonl"), {"stage": "kd", "step": 61}])
    path = report.write_report(*outs, figures=tmp_path / "figures")
    page = visit(path)
    open_all(page)
    assert page.locator("script").count() == 3 and page.locator("main img").count() == 0
    assert not set(page.locator("main").inner_text()) & set("\u202e\u202c\u200f\x07")
    figures = sorted((tmp_path / "figures").glob("*.svg"))
    assert len(figures) == len(list((tmp_path / "figures").glob("*.png"))) == 7  # losses, rate, closing table, 4 sets
    for figure in figures:
        assert xml.etree.ElementTree.parse(figure).getroot().tag.endswith("svg")


def test_figures(make_arms, tmp_path):
    """The files there are, and that their curves have the page's colors."""
    make_arms({"kd": 2, "warm": 1}, figures=tmp_path / "figures")
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    charts = ["loss-of-kd-optimizer-steps", "learning-rate-optimizer-steps", "gsm8k-accuracy-optimizer-steps"]
    charts += ["gsm8k-accuracy-student-s-tokens", "gsm8k-accuracy-teacher-s-tokens"]
    charts += ["closing-table-accuracy-mean-and-sd-arms", "gsm8k-accuracy-mean-and-sd-arms"]
    charts = [f"{number:02d}-{chart}" for number, chart in enumerate(charts)]
    assert names == {f"{chart}.{ending}" for chart in charts for ending in ("svg", "png")}
    template = report.TEMPLATE.read_text(encoding="utf-8")
    for color in (template.split(f"--series{k}: light-dark(")[1][:7] for k in (0, 1)):
        assert all(color in (tmp_path / "figures" / f"{chart}.svg").read_text() for chart in charts)


def test_policy_stops_a_script_that_got_in(chromium, ordinary):
    """The second line of defence: were the escaping to fail, the browser would still refuse the script."""
    owned = "<script>document.title='owned'</script><img src=x onerror=alert(1)><main"
    ordinary.write_text(ordinary.read_text(encoding="utf-8").replace("<main", owned), encoding="utf-8")
    page, refused = chromium.new_page(), []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(ordinary.as_uri())
    assert page.title() != "owned" and any("Content Security Policy" in text for text in refused)
    page.close()


def test_ten_thousand_samples(visit, make_run):  # noqa: F811
    path = report.write_report(make_run(records=records(1251, samples=8, length=256), files=FILES))
    started = time.perf_counter()
    page = visit(path)
    assert time.perf_counter() - started < 5
    assert page.evaluate("document.querySelectorAll('*').length") < 5000  # one sample and one page of the list
    started = time.perf_counter()
    page.evaluate("for (let k = 0; k < 20; k++) document.getElementById('next').click()")
    page.select_option("#order", "margin")
    page.fill("#jump-prompt", "1250")
    page.keyboard.press("Enter")
    assert title(page).startswith("Prompt 1250, sample 0") and time.perf_counter() - started < 4
