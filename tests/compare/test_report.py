"""The report holds what the comparison found, all of it, and nothing that comes from elsewhere or does anything."""

import base64
import re
from decimal import Decimal

import pytest
from lxml import etree, html
from made_comparisons import made_comparison
from made_sweeps import write_run, write_sweep
from markdown_it import MarkdownIt

from megaresid.compare import plots, report, wording
from megaresid.compare.comparison import compare
from megaresid.compare.results import Comparison, Difference, Estimate

PICTURES = {"differences": "<svg xmlns='http://www.w3.org/2000/svg'/>"}
HOSTILE = "<img src=x onerror=alert(1)>|`*_[a](http://evil.example)_*`\n\n# $\\frac{ & \"' <!-- ]]> -->"


def page(comparison: Comparison, drawings=()) -> html.HtmlElement:
    drawings = list(drawings)
    return html.fromstring(report.as_html(comparison, drawings, {d.name: plots.as_svg(d.figure) for d in drawings}))


def markdown(comparison: Comparison, drawings=()) -> html.HtmlElement:
    parser = MarkdownIt("commonmark").enable("table")
    return html.fromstring("<main>" + parser.render(report.as_markdown(comparison, list(drawings))) + "</main>")


def tables_of(root: html.HtmlElement) -> list[list[list[str]]]:
    return [
        [[" ".join(cell.text_content().split()) for cell in row.xpath("./th|./td")] for row in table.xpath(".//tr")]
        for table in root.xpath(".//table")
    ]


def table_with(tables, *columns: str) -> list[dict[str, str]]:
    """The one table with these columns among its own, as rows; those of Markdown and HTML are the same."""
    (found,) = [table for table in tables if set(columns) <= set(table[0])]
    return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


def as_number(text: str) -> Decimal:
    return Decimal(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))


def shows(text: str, value: float, factor: float = 1.0) -> bool:
    """Whether ``text`` is ``value / factor`` rounded to as many places as are written."""
    shown = as_number(text)
    last = Decimal(1).scaleb(shown.as_tuple().exponent)
    return abs(shown - Decimal(value / factor)) <= last * Decimal("0.501")


def shows_interval(text: str, found: Estimate | Difference) -> bool:
    low, high = text.split(" to ")
    return shows(low, found.low) and shows(high, found.high)


def shows_difference(row: dict[str, str], found: Difference) -> bool:
    return (
        shows(row["difference"], found.mean)
        and row["difference"][0] in "+\N{MINUS SIGN}"
        and shows(row["p (paired t)"], found.p_t)
        and shows(row["p (Holm)"], found.p_holm)
        and shows(row["p (permutation)"], found.p_permutation)
        and shows(row["detectable"], found.detectable)
        and row["verdict"] == found.verdict
    )


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return made_comparison()


@pytest.fixture(scope="module", params=[page, markdown])
def tables(request, comparison):
    return tables_of(request.param(comparison))


def test_final_losses(tables, comparison):
    rows = table_with(tables, "spec hash", "seeds")
    assert [row["variant"].removesuffix(" (baseline)") for row in rows] == [v.name for v in comparison.variants]
    for row, variant in zip(rows, comparison.variants, strict=True):
        assert shows(row["validation loss (nats per token)"], variant.loss.mean)
        assert shows_interval(row["95% interval"], variant.loss)
        assert (row["seeds"], row["learning rate"], row["spec hash"]) == ("3", "0.0003", variant.spec_hash)


def test_differences(tables, comparison):
    (found,) = [table for table in tables if "difference" in table[0] and "mean" not in table[0]]
    for cells, variant in zip(found[1:], comparison.variants[1:], strict=True):
        row = dict(zip(found[0], cells, strict=True))
        assert row["variant"] == variant.name and row["seeds"] == "1, 2, 3"
        assert shows_difference(row, variant.difference) and shows_interval(row["95% interval"], variant.difference)


def test_metrics(tables, comparison):
    found = [table for table in tables if "mean" in table[0]]
    assert len(found) == 2
    for number, table in enumerate(found):
        for cells, variant in zip(table[1:], comparison.variants, strict=True):
            metric = variant.metrics[number]
            assert shows(cells[2], metric.estimate.mean) and shows_interval(cells[3], metric.estimate)
            if metric.difference is not None:
                row = dict(zip(table[0][4:], cells[4:], strict=True))
                assert shows_difference(row, metric.difference) and shows_interval(cells[6], metric.difference)


def test_cost(tables, comparison):
    rows = table_with(tables, "parameters", "GFLOPs per token", "MFU (%)", "peak memory (GiB)")
    for row, variant in zip(rows, comparison.variants, strict=True):
        cost = variant.cost
        assert as_number(row["parameters"]) == cost.parameters
        assert shows(row["GFLOPs per token"], cost.flops_per_token, 1e9)
        for column, estimate, factor in (
            ("tokens per second", cost.tokens_per_second, 1),
            ("step time (s)", cost.step_seconds, 1),
            ("MFU (%)", cost.mfu, 0.01),
            ("peak memory (GiB)", cost.memory_bytes, 2**30),
        ):
            mean, half = row[column].split(" ± ")
            assert shows(mean, estimate.mean, factor) and shows(half, (estimate.high - estimate.low) / 2, factor)
        if cost.step_ratio is not None:
            assert shows(row["step time / baseline's"], cost.step_ratio)


def test_equal_cost_and_orders(tables, comparison):
    (table,) = [table for table in tables if "loss at 524,288,000 tokens" in table[0]]
    assert table[0][1::3] == ["loss at 524,288,000 tokens", "loss at 1.101 EFLOPs", "loss at 23.57 minutes"]
    for cells, variant in zip(table[1:], comparison.variants, strict=True):
        for place, what in enumerate(("tokens", "flops", "seconds")):
            estimate = getattr(variant.equal, what)
            assert shows(cells[1 + 3 * place], estimate.mean) and shows_interval(cells[2 + 3 * place], estimate)
            assert getattr(comparison.orders, what)[int(cells[3 + 3 * place]) - 1] == variant.name


def test_learning_rates(tables, comparison):
    rows = table_with(tables, "learning rate", "diverged")
    tried = [(variant, at) for variant in comparison.variants for at in variant.rates]
    for row, (variant, at) in zip(rows, tried, strict=True):
        assert float(row["learning rate"]) == at.learning_rate and int(row["diverged"]) == at.diverged
        assert shows(row["validation loss (nats per token)"], at.loss.mean)
        assert shows_interval(row["95% interval"], at.loss)
        assert (row[""] == "best") == (at.learning_rate == variant.learning_rate)


def test_every_sample_with_its_run_and_step(tables, comparison):
    listed = [table for table in tables if table[0] == ["number", "seed", "value", "run", "step"]]
    for table, variant in zip(listed, comparison.variants, strict=True):
        of = variant.cost
        estimates = [variant.loss, *(metric.estimate for metric in variant.metrics)]
        estimates += [of.tokens_per_second, of.step_seconds, of.mfu, of.memory_bytes]
        estimates += [variant.equal.tokens, variant.equal.flops, variant.equal.seconds]
        estimates += [at.loss for at in variant.rates]
        samples = [sample for estimate in estimates for sample in estimate.samples]
        for row, sample in zip(table[1:], samples, strict=True):
            assert row[1:2] + row[3:] == [str(sample.seed), sample.source.run, str(sample.source.step)]
            assert float(row[2]) == pytest.approx(sample.value, rel=1e-6)


def test_points_of_the_curves_are_on_the_page(comparison):
    listed = [table for table in tables_of(page(comparison)) if "seconds of training" in table[0]]
    for table, variant in zip(listed, comparison.variants, strict=True):
        points = [(curve, point) for curve in variant.curves for point in curve.points]
        for row, (curve, point) in zip(table[1:], points, strict=True):
            assert row[:3] == [curve.run, str(curve.seed), str(point.step)] and as_number(row[3]) == point.tokens
            assert float(row[4]) == pytest.approx(point.flops, rel=1e-5)
            assert float(row[5]) == pytest.approx(point.seconds, rel=1e-5)
            assert shows(row[6], point.loss)


def test_hover_tells_the_source_of_a_mean(comparison):
    for variant in comparison.variants:
        (cell,) = page(comparison).xpath(f"//td[text()='{variant.loss.mean:.4f}'][contains(@title, 'runs/')]")[:1]
        assert all(f"({s.source.run}, step {s.source.step})" in cell.get("title") for s in variant.loss.samples)


@pytest.mark.parametrize("make", [page, markdown])
def test_answer_comes_first(make, comparison):
    text = " ".join(make(comparison).text_content().split())
    better, worse, same = (text.index(word) for word in ("Better", "Worse", "Not distinguishable"))
    assert better < worse < same < text.index("Final loss")
    difference = comparison.variants[1].difference
    half = (difference.high - difference.low) / 2
    assert "at equal tokens (524,288,000 tokens), against vanilla" in text[:same]
    assert f"attention_residual(blocks=8): loss lower by 0.0219 ± {half:.4f} (p = " in text[better:worse]
    assert "hyper_connection(streams=4, dynamic=true): loss higher by 0.0184" in text[worse:same]
    assert "learned_scaling: difference \N{MINUS SIGN}0.0023" in text[same:]
    assert comparison.orders.remark in text and comparison.problems[0].line in text
    assert comparison.differing[0].values[2][1][0] in text and comparison.notes[0] in text


@pytest.mark.parametrize("make", [page, markdown])
def test_a_refusal_ranks_nothing(make, comparison):
    why = "The validation sets differ: a1b2 and c3d4."
    refused = comparison.model_copy(update={"refusal": why, "orders": None, "budget": None})
    root = make(refused)
    text = " ".join(root.text_content().split())
    assert text.index("Not ranked") < text.index(why) < text.index("Final loss")
    for word in ("Better", "Worse", "detectable", "distinguishable", "place", "Answer", "Holm"):
        assert word not in text
    names = [row["variant"] for row in table_with(tables_of(root), "spec hash")]
    assert names == ["vanilla (baseline)", *sorted(v.name for v in comparison.variants[1:])]


def test_allowed_is_told(comparison):
    allowed = comparison.model_copy(update={"allowed": "they differ in data. Ranked all the same: a test"})
    assert "they differ in data. Ranked all the same: a test" in page(allowed).xpath("string(//section[1])")


def test_one_seed_and_no_common_seed(comparison):
    alone = made_comparison({"x": (-0.01, "better", 0.1)}, seeds=1, rates=1)
    text = page(alone).xpath("string(//section[1])")
    assert "Too few seeds to tell" in text and "difference \N{MINUS SIGN}0.0100 (1 seed)" in text
    variants = (comparison.variants[0], comparison.variants[1].model_copy(update={"difference": None}))
    text = page(comparison.model_copy(update={"variants": variants})).xpath("string(//section[1])")
    assert "Not compared" in text and variants[1].name in text
    single = comparison.model_copy(update={"variants": variants[:1], "orders": None, "budget": None})
    assert "nothing to compare" in page(single).text_content()


def test_what_is_unknown_is_told(comparison):
    bare = comparison.variants[1]
    bare = bare.model_copy(
        update={
            "cost": bare.cost.model_copy(update={"mfu": None}),
            "rates": tuple(at.model_copy(update={"loss": None}) for at in bare.rates),
            "equal": bare.equal.model_copy(update={"flops": None}),
            "curves": (),
        }
    )
    rows = tables_of(page(comparison.model_copy(update={"variants": (comparison.variants[0], bare)})))
    assert table_with(rows, "parameters", "MFU (%)")[1]["MFU (%)"] == "n/a"
    assert table_with(rows, "learning rate", "diverged")[-1]["validation loss (nats per token)"] == "n/a"
    assert table_with(rows, "loss at 1.101 EFLOPs")[1]["loss at 1.101 EFLOPs"] == "n/a"


def test_a_twin_of_the_baseline(comparison):
    zero = {"mean": 0.0, "low": 0.0, "high": 0.0, "detectable": 0.0, "p_t": 1.0, "p_holm": 1.0}
    twin = comparison.variants[2]
    twin = twin.model_copy(update={"difference": twin.difference.model_copy(update=zero)})
    both = comparison.model_copy(update={"variants": (comparison.variants[0], twin)})
    text = page(both).xpath("string(//section[1])")
    assert "the same loss as the baseline's in each of 3 seeds" in text


def test_rates_at_the_edge_are_told_in_one_line(comparison):
    edges = [v.model_copy(update={"at_edge": v.name != "learned_scaling"}) for v in comparison.variants]
    (line,) = [line for line in wording.warnings(comparison.model_copy(update={"variants": edges})) if "edge" in line]
    for variant in edges:
        assert (f"{variant.name} (0.0003)" in line) == variant.at_edge
    assert not any("edge" in line for line in wording.warnings(comparison))


@pytest.mark.parametrize(
    ("tokens", "flops", "seconds", "said"),
    [
        (1.0, 3.0, 3.0, "at equal tokens"),
        (1.001, 1.019, 3.0, "at equal FLOPs"),
        (1.001, 1.03, 1.019, "at equal time"),
        (1.001, 1.03, 1.03, "at the end of runs of different cost"),
    ],
)
def test_what_was_spent_equally_is_said(comparison, tokens, flops, seconds, said):
    """One run's totals are so many times those of the others."""

    def ending(variant, *factors):
        ends = [
            curve.points[-1].model_copy(
                update={key: 1e6 * factor for key, factor in zip(("tokens", "flops", "seconds"), factors)}
            )
            for curve in variant.curves
        ]
        curves = [curve.model_copy(update={"points": (end,)}) for curve, end in zip(variant.curves, ends)]
        return variant.model_copy(update={"curves": tuple(curves)})

    first, other = comparison.variants[:2]
    variants = (ending(first, 1.0, 1.0, 1.0), ending(other, tokens, flops, seconds))
    assert wording.footing(comparison.model_copy(update={"variants": variants})).startswith(said)


def test_many_runs_of_one_value_are_listed_in_part(comparison):
    runs = tuple(f"run-{number}" for number in range(40))
    values = tuple((str(count), runs[:count]) for count in (6, 7, 40))
    one = comparison.differing[0].model_copy(update={"values": values})
    rows = tables_of(page(comparison.model_copy(update={"differing": (one,)})))
    six, seven, forty = [row["which"] for row in table_with(rows, "what", "which")]
    assert six == ", ".join(runs[:6])
    assert seven == "run-0, run-1, run-2, run-3, run-4 and 2 more (all in report.json)"
    assert forty == "run-0, run-1, run-2, run-3, run-4 and 35 more (all in report.json)"


def test_one_learning_rate_is_not_called_the_best():
    rows = table_with(tables_of(page(made_comparison(rates=1))), "learning rate", "diverged")
    assert [row[""] for row in rows] == [""] * 4


def hostile() -> Comparison:
    found = made_comparison({HOSTILE: (-0.01, "better", 0.1), "plain": (0.01, "worse", 0.1)}, baseline=f"_{HOSTILE}")
    where = {"run": HOSTILE, "line": HOSTILE}
    return found.model_copy(
        update={
            "notes": (HOSTILE,),
            "allowed": HOSTILE,
            "problems": tuple(p.model_copy(update=where) for p in found.problems),
            "differing": tuple(
                d.model_copy(update={"key": HOSTILE, "values": ((HOSTILE, (HOSTILE,)),)}) for d in found.differing
            ),
        }
    )


def test_hostile_names_stay_text():
    found = hostile()
    drawings = plots.draw(found)
    for root in (page(found, drawings), markdown(found, drawings)):
        assert not root.xpath("//script | //*[@onerror] | //iframe | //link | //object")
        pictures = root.xpath("//img")
        assert len(pictures) == len(drawings)
        assert all(p.get("src").startswith(("data:image/svg+xml;base64,", "plots/")) for p in pictures)
        assert all(a.get("href").startswith("#") or a.get("href") == "report.json" for a in root.xpath("//a"))
        assert not root.xpath("//code | //em")
        text = " ".join(root.text_content().split())
        assert text.count(" ".join(HOSTILE.split())) > 20
        sections = [h.text_content() for h in root.xpath("//h1")]
        assert len(sections) == 1
        for table in root.xpath("//table"):
            assert len({len(row.xpath("./th|./td")) for row in table.xpath(".//tr")}) == 1


def test_page_needs_nothing_else(tmp_path):
    found = made_comparison()
    report.write(found, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    outside = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "data:", text)
    assert "http:" not in outside and "https:" not in outside and "@import" not in outside
    assert set(re.findall(r'(?:src|href)="([^"]*)"', outside)) <= {"data:"} | set(re.findall(r'href="(#\w+)"', outside))
    root = html.fromstring(text)
    ids = root.xpath("//@id")
    assert len(ids) == len(set(ids)) and {h[1:] for h in root.xpath("//a/@href")} <= set(ids)
    assert not root.xpath("//script") and all(image.get("alt") for image in root.xpath("//img"))
    assert all(cell.get("scope") for cell in root.xpath("//th")) and root.get("lang") == "en"
    for source in root.xpath("//img/@src"):
        svg = etree.fromstring(base64.b64decode(source.split(",")[1]))
        links = svg.xpath("//@*[local-name()='href']")
        assert all(link.startswith("#") for link in links)
        assert not svg.xpath("//*[local-name()='script' or local-name()='image']")
    names = {path.stem for path in (tmp_path / "report" / "plots").iterdir()}
    assert len(names) == 8 and len(list((tmp_path / "report" / "plots").iterdir())) == 16
    written = (tmp_path / "report" / "report.md").read_text()
    assert set(re.findall(r"\]\(plots/(\w+)\.svg\)", written)) == names
    assert not list(tmp_path.rglob("*.partial"))
    read = Comparison.model_validate_json((tmp_path / "report" / "report.json").read_text())
    assert read == found


def test_same_comparison_same_files(comparison):
    # One plot stands for all: they are written by the same function.
    twice = [(report.as_html(comparison, [], {}), report.as_markdown(comparison, [])) for _ in range(2)]
    assert twice[0] == twice[1]
    (first, *_), (second, *_) = plots.draw(comparison), plots.draw(comparison)
    assert plots.as_svg(first.figure) == plots.as_svg(second.figure)
    assert plots.as_png(first.figure) == plots.as_png(second.figure)


def test_a_full_disk_leaves_no_half_file(tmp_path, comparison, monkeypatch):
    few = comparison.variants[0].model_copy(update={"curves": ()})
    report.write(comparison.model_copy(update={"variants": (few,)}), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megaresid.durable.sync", full)
    with pytest.raises(OSError, match="No space"):
        report.write(made_comparison({}, seeds=2), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_from_run_directories(tmp_path):
    """The whole chain: what the runs ended with is what the page says, whatever stands between."""
    losses = {"vanilla": [3.200, 3.212, 3.195], "good": {1e-3: [3.150, 3.166, 3.143], 3e-3: [3.3, None, 3.3]}}
    sweep = write_sweep(tmp_path / "sweep", losses, metrics={"wikitext_word_perplexity": 44.5})
    write_run(sweep / "runs" / "cut", residual="good", seed=4, until=20)
    found = compare([sweep])
    drawings = plots.draw(found)
    report.write(found, tmp_path / "report")
    for root in (html.parse(str(tmp_path / "report" / "report.html")).getroot(), markdown(found, drawings)):
        text = " ".join(root.text_content().split())
        assert "good: loss lower by 0.0493" in text and "1 of good" in text
        rows = table_with(tables_of(root), "spec hash")
        assert [row["validation loss (nats per token)"] for row in rows] == ["3.2023", "3.1530"]
        problems = {row[0]: row[1] for table in tables_of(root) if table[0] == ["run", "why"] for row in table[1:]}
        assert any("cut" in run for run in problems) and all(problems.values())


def test_of_what_is_refused_there_are_no_findings(comparison):
    assert wording.findings(comparison) and not wording.findings(comparison.model_copy(update={"refusal": "why"}))


def test_the_better_direction_of_a_metric_is_said(comparison):
    captions = [table.caption for table in report.tables.metrics(comparison)]
    assert captions == ["wikitext2 perplexity (lower is better)", "hellaswag accuracy (higher is better)"]


def test_hover_tells_each_seeds_value_of_loss_and_cost(comparison):
    titles = page(comparison).xpath("//td/@title")
    for variant in comparison.variants:
        for estimate in (variant.loss, variant.cost.tokens_per_second, variant.cost.memory_bytes):
            told = [f"seed {s.seed}: {s.value:.6g} ({s.source.run}, step {s.source.step})" for s in estimate.samples]
            assert "; ".join(told) in titles


@pytest.mark.parametrize("special", "\\`*_[]<>#!|~$&")
def test_nothing_of_a_name_has_a_meaning_in_markdown(comparison, special):
    text = report.as_markdown(comparison.model_copy(update={"made": f"a{special}b"}), [])
    assert f"\nMade a\\{special}b.\n" in text
