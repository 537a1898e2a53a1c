"""The report: figures against hand computation and brute force, and a page that is safe, complete and offline."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow.parquet as pq
import pytest
import report_corpus

import efftrain.data.report.tables as tables
from efftrain.data.documents import Text
from efftrain.data.report import filter_rows, size, write_report
from efftrain.data.report.alerts import alarms
from efftrain.data.report.figures import (
    collision_curve,
    expected_recall,
    score_histogram,
    wilson_interval,
)
from efftrain.data.report.scores import Histogram, Interval, bin_edges, histograms, intervals, number
from efftrain.data.rules import AtLeast, AtMost, Between, Code, TopNgram
from efftrain.errors import ConfigError, CorpusError


class Page(HTMLParser):
    """Elements with their attributes, and the text outside script and style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._inside = [], "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside not in ("script", "style"):
            self.text += text


def rows(markup):
    """First cell -> the other cells, of the rows of a table."""
    found = [re.findall(r"<td.*?</td>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", markup, re.DOTALL)]
    texts = [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in found if row]
    return {first: others for first, *others in texts}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return report_corpus.write(tmp_path_factory.mktemp("report") / "small")


@pytest.fixture(scope="module")
def page(corpus):
    return write_report(corpus).read_text(encoding="utf-8")


def test_page_lies_beside_the_corpus_and_stays_small(corpus):
    out = write_report(corpus)
    assert out == corpus.parent / "small-report.html"
    assert out.stat().st_size < 6e6
    assert sorted(path.name for path in corpus.iterdir()) == ["manifest.json", "removed.parquet", "scores.parquet"]


def test_page_loads_nothing_and_forbids_it(page):
    elements = Page(page).elements
    assert [tag for tag, _ in elements if tag in ("link", "iframe", "img", "object", "embed", "base")] == []
    assert not any("src" in attributes or "action" in attributes for _, attributes in elements)
    assert all(attributes["href"].startswith("#") for tag, attributes in elements if tag == "a")
    assert "@import" not in page.split("</style>")[0]
    policy = next(attributes["content"] for tag, attributes in elements if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none';")


def test_documents_do_not_become_markup_or_control_characters(page):
    assert "<script>alert" not in page
    assert page.count("</script>") == sum(tag == "script" for tag, _ in Page(page).elements)
    assert "\x1b" not in page
    assert "\x07" not in page
    shown = Page(page).text
    assert "<script>alert(1)</script> & \"quotes\" '</pre>' ␛[31mred␇" in shown


def test_hostile_names_do_not_become_markup(tmp_path):
    rows = [report_corpus.removed_row("a", "<img src=x>", 1.0)]
    columns = {"</script><b>": np.arange(10, dtype=np.float32)}
    near = {"threshold": 0.75, "rows": 8, "bands": 14, "n_permutations": 112, "candidates": 0, "removed": 0}
    near |= {"clusters": 0, "largest_bucket": 0, "oversized_buckets": 0, "recall": [], "canary": None}
    splits = {"<i>train": {"documents": 9, "bytes": 900, "tokens": 90}}
    corpus = report_corpus.write(tmp_path / "<b>x", rows=rows, columns=columns, near_duplicates=near, splits=splits)
    elements = Page(write_report(corpus, tmp_path / "page.html").read_text()).elements
    assert [tag for tag, _ in elements if tag == "img"] == []
    assert sum(tag == "i" for tag, _ in elements) == len([a for t, a in elements if t == "i" and "style" in a])


def test_funnel_counts_what_is_left_and_marks_estimated_tokens():
    rows = [
        {"stage": "seen", "documents": 200, "bytes": 4000},
        {"stage": "too_long", "documents": 50, "bytes": 3000},
        {"stage": "exact_duplicate", "documents": 30, "bytes": 200},
        {"stage": "kept", "documents": 120, "bytes": 800},
    ]
    seen, long, duplicate, kept = filter_rows(rows, 0.25, n_kept=203)
    assert (seen["left"], long["left"], duplicate["left"], kept["left"]) == (200, 150, 120, 120)
    assert (long["reached"], duplicate["reached"]) == (200, 150)
    assert (long["tokens"], long["estimated"]) == (750, True)
    assert (kept["tokens"], kept["estimated"]) == (203, False)
    assert kept["share"] == 0.6
    assert filter_rows(rows, None)[1]["tokens"] is None


def test_page_shows_the_funnel_with_estimates_marked(page):
    # 830 of 1,000 documents of 100 bytes are kept as 21,250 tokens: 3.906 bytes each, so 4,000 bytes are 1,024 tokens.
    found = rows(page.split('id="funnel"')[1].split('id="sources"')[0])
    assert found["too_short"][:6] == ["−40", "4.0%", "−4 kB", "≈ −1,024", "960", "96.0%"]
    assert found["near_duplicate"][1] == "11.2%"  # of the 935 that reach it
    assert found["kept"][:6] == ["830", "", "83 kB", "21,250", "830", "83.0%"]


def test_expected_recall_is_that_of_pairs_within_the_step():
    """Against simulated bands, for pairs whose similarity lies anywhere in the step."""
    rng = np.random.default_rng(0)
    for similarity in (0.5, 0.75, 0.95):
        each = rng.uniform(similarity, similarity + 0.05, (20_000, 1, 1))
        simulated = (rng.random((20_000, 14, 8)) < each).all(axis=2).any(axis=1).mean()
        assert expected_recall(similarity, 14, 8) == pytest.approx(simulated, abs=0.01)
    assert expected_recall(1.0, 14, 8) == 1


def test_curve_shows_measured_points_with_their_intervals():
    near = {"bands": 14, "rows": 8, "threshold": 0.75}
    recall = [{"similarity": 0.8, "pairs": 40, "found": 30}, {"similarity": 0.9, "pairs": 0, "found": 0}]
    curve, points = collision_curve({**near, "recall": recall})["data"]
    assert curve["y"][160] == pytest.approx(0.924, abs=1e-3)
    assert (points["x"], points["y"]) == (pytest.approx([0.825]), [0.75])
    assert len(collision_curve({**near, "recall": []})["data"]) == 1


@pytest.mark.parametrize(("found", "pairs"), [(0, 40), (37, 40), (40, 40), (5, 11)])
def test_wilson_interval_against_scipy(found, pairs):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(found, pairs).proportion_ci(0.95, method="wilson")
    assert wilson_interval(found, pairs) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_intervals_are_those_of_the_rules_and_unknown_classes_are_left_out():
    found = intervals(report_corpus.PARAMETERS)
    assert found == {"too_short": Interval(low=64), "table_like": Interval(high=0.35)}


@pytest.mark.parametrize("rule", Code().rules(), ids=lambda rule: rule.name)
def test_interval_keeps_what_the_rule_keeps(rule):
    from efftrain.config import to_json

    interval = intervals({"rules": [to_json(Code())]})[rule.name]
    values = np.array([-1.0, 0.0, rule.threshold * 0.9, rule.threshold, rule.threshold * 1.1, 1e9])
    assert interval.keeps(values).tolist() == [rule.keeps(value) for value in values]
    assert isinstance(rule, (AtMost, AtLeast, Between))


def test_interval_says_what_it_keeps():
    assert str(Interval(high=1000)) == "keeps at most 1,000"
    assert str(Interval(low=0.25)) == "keeps at least 0.25"
    assert str(Interval(3, 10)) == "keeps 3 to 10"


def test_score_stored_in_float32_at_the_threshold_is_kept():
    assert Interval(high=0.1).keeps(np.array([0.1, 0.2], np.float32)).tolist() == [True, False]


def test_shares_above_one_stand_in_the_histogram(tmp_path):
    """datatrove's share of the top n-gram exceeds 1 where its occurrences overlap."""
    texts = ["a b c d", "a a a a", "a a a a a a"]
    rule = TopNgram(n=2, threshold=0.2, as_datatrove=True)
    columns = {rule.name: np.array([rule.score(Text(text)) for text in texts], np.float32)}
    corpus = report_corpus.write(tmp_path / "corpus", rows=[], columns=columns)
    (histogram,) = histograms(corpus, {rule.name: Interval(high=rule.threshold)})
    assert histogram.edges[-1] == columns[rule.name].max() > 1
    assert histogram.rejected.sum() == histogram.n_rejected == 3
    assert histogram.rejected[-1] == 1


def test_histogram_counts_every_document_on_its_side(tmp_path):
    columns = report_corpus.scores(5000)
    columns["too_short"][:7] = np.nan
    columns["table_like"][0] = np.inf
    corpus = report_corpus.write(tmp_path / "c", columns=columns, row_group=333)
    found = {h.rule: h for h in histograms(corpus, intervals(report_corpus.PARAMETERS))}
    short, table, secret = (found[name] for name in columns)
    below = int((columns["too_short"] < 64).sum())
    assert (short.n_rejected, short.n_kept) == (below + 7, 5000 - below - 7)
    assert (short.rejected.sum(), short.kept.sum()) == (below, 5000 - below - 7)  # nan has no place on the axis
    assert short.logarithmic
    assert table.rejected.sum() == table.n_rejected == (columns["table_like"] > 0.35).sum()
    assert not table.logarithmic
    assert (secret.interval, secret.n_rejected, secret.kept.sum()) == (None, 0, 5000)
    exact, _ = np.histogram(columns["mine/secret"], secret.edges)
    np.testing.assert_array_equal(secret.kept, exact)


def test_bars_stand_apart_at_the_threshold(tmp_path):
    """Away from the threshold's bin, no bin holds both kept and rejected documents."""
    corpus = report_corpus.write(tmp_path / "c", columns=report_corpus.scores(5000))
    for histogram in histograms(corpus, intervals(report_corpus.PARAMETERS)):
        if histogram.interval:
            both = np.flatnonzero((histogram.kept > 0) & (histogram.rejected > 0))
            (end,) = histogram.interval.ends
            assert all(histogram.edges[i] <= end <= histogram.edges[i + 1] for i in both)


@pytest.mark.parametrize(
    ("low", "high", "positive", "ends", "logarithmic"),
    [
        (10, 5e6, 10, (1e6,), True),
        (0, 0.9, 0.01, (0.35,), False),
        (0, 0.3, 1e-5, (0.001,), True),
        (3, 12, 3, (3, 10), False),
        (-5, 4000, 1, (1,), False),
        (0, 0, np.inf, (0.5,), False),
        (7, 7, 7, (), False),
        (np.inf, -np.inf, np.inf, (), False),
        (0, 0, np.inf, (0,), False),
        (0, 5000, 1, (0,), False),  # a threshold of zero has no place on a logarithmic axis
        (0, 5e6, 1, (0, 1000), True),
    ],
)
def test_bins_cover_scores_and_thresholds(low, high, positive, ends, logarithmic):
    edges, found = bin_edges(low, high, positive, ends)
    assert found == logarithmic
    assert (np.diff(edges) > 0).all()
    reach = [value for value in (low, high, *ends) if np.isfinite(value)]
    assert edges[-1] >= max(reach, default=0) * (1 - 1e-12)
    assert edges[0] <= min(value for value in (positive if found else low, *ends, np.inf) if value or not found)


def test_figures_are_valid_for_plotly(corpus):
    import plotly.graph_objects as go

    manifest = json.loads((corpus / "manifest.json").read_text())
    shown = [score_histogram(h) for h in histograms(corpus, intervals(report_corpus.PARAMETERS))]
    for figure in [*shown, collision_curve(manifest["near_duplicates"])]:
        text = json.dumps(figure, allow_nan=False)
        built = go.Figure(json.loads(re.sub('"@[a-z]+"', '"#123456"', text)))  # raises on an unknown property
        assert len(built.data) == len(figure["data"]) > 0


def test_threshold_of_zero_is_left_out_of_a_logarithmic_axis():
    histogram = Histogram("r", Interval(0, 1000), np.geomspace(1, 1e6, 4), True, np.ones(3), np.ones(3), 3, 3)
    assert [shape["x0"] for shape in score_histogram(histogram)["layout"]["shapes"]] == [3]


def test_threshold_is_marked_where_the_axis_has_it(corpus):
    short, table, _ = (score_histogram(h) for h in histograms(corpus, intervals(report_corpus.PARAMETERS)))
    assert short["layout"]["shapes"][0]["x0"] == pytest.approx(np.log10(64))
    assert table["layout"]["shapes"][0]["x0"] == 0.35


def test_random_rows_are_few_uniform_seeded_and_blind_to_batches(monkeypatch, corpus):
    def sample(seed, batch):
        monkeypatch.setattr(tables, "_BATCH", batch)
        rows = tables.RandomRows(5, seed)
        for part in tables.batches(corpus, tables.REMOVED):
            rows.add(part)
        return {rule: [row["id"] for row in found] for rule, found in rows.rows().items()}

    assert sample(0, 1000) == sample(0, 7)
    assert sample(0, 1000) != sample(1, 1000)
    assert {rule: len(set(ids)) for rule, ids in sample(0, 50).items()} == {
        "too_short": 5,
        "table_like": 5,
        "near_duplicate": 5,
    }
    drawn = [id for seed in range(400) for id in sample(seed, 1000)["too_short"]]
    counts = np.unique(drawn, return_counts=True)[1]
    assert len(counts) == 40
    assert abs(counts - 50).max() < 35  # 400 draws of 5 in 40: 50 each, standard deviation 6.6


def test_largest_clusters_against_brute_force(monkeypatch, tmp_path):
    """Shuffled rows in small batches, with ties in size."""
    rng = np.random.default_rng(0)
    sizes = {f"c{n:03d}": int(rng.integers(2, 12)) for n in range(60)}
    rows = [
        report_corpus.near_duplicate(f"{cluster}-{n}", cluster, size, "diff" if n == 2 else None)
        for cluster, size in sizes.items()
        for n in range(size - 1)
    ]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    corpus = report_corpus.write(tmp_path / "c", rows=rows, row_group=13)
    monkeypatch.setattr(tables, "_BATCH", 13)
    clusters = tables.LargestClusters()
    for batch in tables.batches(corpus, tables.REMOVED):
        clusters.add(batch)
    expected = sorted(sizes, key=lambda cluster: (-sizes[cluster], cluster))[:10]
    found = clusters.clusters()
    assert [cluster.id for cluster in found] == expected
    assert [(c.size, c.removed, c.n_bytes) for c in found] == [
        (sizes[c], sizes[c] - 1, 100 * (sizes[c] - 1)) for c in expected
    ]
    assert all(cluster.members[0]["diff"] == "diff" for cluster in found)
    assert all(len({member["id"] for member in cluster.members}) == 3 for cluster in found)


def manifest_with(**changes):
    rows = [("seen", 100), ("a", 10), ("b", 9), ("kept", 81)]
    table = [{"stage": stage, "documents": n, "bytes": n} for stage, n in rows]
    base = {"parameters": report_corpus.PARAMETERS, "funnel": table, "sources": {"web": table}}
    splits = {name: {"documents": 1, "bytes": 1, "tokens": 1} for name in ("train", "validation")}
    return base | {"splits": splits, "near_duplicates": {"canary": {"planted": 4, "found": 4}}} | changes


def stages(*rows):
    return [{"stage": stage, "documents": n, "bytes": n_bytes} for stage, n, n_bytes in rows]


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        ({"near_duplicates": {"canary": {"planted": 4, "found": 3}}}, ["Of 4 planted duplicates only 3 were found"]),
        ({"near_duplicates": {"canary": {"planted": 10, "found": 9}}}, []),
        ({"near_duplicates": {"canary": {"planted": 0, "found": 0}}}, ["No canary was planted"]),
        ({"near_duplicates": None}, []),
        ({"splits": {"train": {"documents": 5}}}, ["The split validation has no documents."]),
        (
            {"splits": {"train": {"documents": 0}, "validation": {"documents": 3}}},
            ["The split train has no documents."],
        ),
        ({"sources": {"web": stages(("seen", 10, 10), ("a", 5, 5), ("kept", 5, 5))}}, []),
        (
            {"sources": {"web": stages(("seen", 10, 10), ("a", 1, 1), ("b", 5, 4), ("kept", 4, 5))}},
            ["The source web loses 60% of its documents and 50% of its bytes, most documents to b (5)."],
        ),
        (
            {"sources": {"web": stages(("seen", 10, 10), ("a", 1, 9), ("kept", 9, 1))}},
            ["The source web loses 10% of its documents and 90% of its bytes"],
        ),
        ({"sources": {"none": stages(("seen", 0, 0), ("kept", 0, 0))}}, []),
        ({"funnel": stages(("seen", 10, 0), ("a", 3, 0), ("b", 2, 0), ("kept", 5, 0))}, []),
        (
            # 2 of 10 pass unnoticed behind the 5 before them unless the share is of those that reach the rule.
            {"funnel": stages(("seen", 10, 0), ("a", 5, 0), ("b", 2, 0), ("kept", 3, 0))},
            ["a drops 50% of the documents that reach it (5 of 10)", "b drops 40% of the documents that reach it"],
        ),
        ({"decontamination": {"mmlu": {"documents": 0, "removed": 0}}}, ["The evaluation set mmlu has no documents"]),
        (
            {"decontamination": {"quiz": {"documents": 50, "removed": 0, "short": 7, "n": 8}}},
            ["7 of 50 documents of the evaluation set quiz are too short"],
        ),
        ({"unreadable": {"files": 0, "first": []}}, []),
        (
            {"unreadable": {"files": 2, "first": ["a.gz@7: the file ends", "b.gz@9: the file ends"]}},
            ["2 files could not be read to the end, such as a.gz@7"],
        ),
        ({"funnel": stages(("seen", 1000, 0), ("failed/mine", 1, 0), ("kept", 999, 0))}, ["failed/mine drops 0%"]),
        ({"split_by": "document"}, ["There are fewer groups of documents than splits"]),
    ],
)
def test_alarms(changes, sentences):
    found = alarms(manifest_with(**changes))
    assert len(found) == len(sentences)
    assert all(text.startswith(start) for text, start in zip(found, sentences, strict=True))


def test_alarms_stand_at_the_top_of_the_page(tmp_path):
    corpus = report_corpus.write(tmp_path / "c", splits={"train": {"documents": 0, "bytes": 0, "tokens": 0}})
    page = write_report(corpus).read_text()
    assert page.index("The split train has no documents.") < page.index('id="funnel"')


def test_page_shows_decontamination_and_cut_lines(tmp_path):
    lines = {"repeats": 9, "edited": 41, "bytes": 12_345, "removed": 2}
    page = write_report(report_corpus.write(tmp_path / "c", repeated_lines=lines)).read_text()
    assert "12.3 kB were cut from 41 documents" in Page(page).text
    found = rows(page.split('<h2 id="decontamination"')[1].split("<h2")[0])
    assert found == {"validation": ["50", "–", "2"], "gsm8k": ["1,319", "7", "3"]}


def test_corpus_without_rules_duplicates_or_rejects_has_a_page(tmp_path):
    corpus = report_corpus.write(
        tmp_path / "c", rows=[], columns={}, near_duplicates=None, decontamination={}, sources={}
    )
    shown = Page(write_report(corpus).read_text()).text
    assert "Nothing was removed." in shown
    assert "built without a search for near duplicates" in shown


def test_columns_of_near_duplicates_may_be_absent(tmp_path):
    corpus = report_corpus.write(tmp_path / "c", near_duplicates=None)
    table = pq.read_table(corpus / "removed.parquet")
    pq.write_table(table.select(table.column_names[:7]), corpus / "removed.parquet")
    assert "25 of 25" not in (page := write_report(corpus).read_text())
    assert "20 of 25" in page


@pytest.mark.parametrize("table", ["removed.parquet", "scores.parquet"])
def test_missing_or_damaged_table_is_named(tmp_path, table):
    corpus = report_corpus.write(tmp_path / "c")
    (corpus / table).write_bytes(b"PAR1 no PAR1")
    with pytest.raises(CorpusError, match=rf"{table} cannot be read .*; build the corpus again"):
        write_report(corpus)
    (corpus / table).unlink()
    with pytest.raises(CorpusError, match=rf"{table} is missing; build the corpus again"):
        write_report(corpus)
    assert not list(tmp_path.glob("*.html"))


def test_missing_corpus_and_impossible_place(tmp_path, corpus):
    with pytest.raises(CorpusError, match="there is no corpus"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="lies inside the corpus"):
        write_report(corpus, corpus / "page.html")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_report(corpus, tmp_path / "no" / "folder" / "page.html")


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345_678, "12.3 MB"), (5e15, "5,000.0 TB")]
)
def test_size(value, text):
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1_000_000, "1,000,000"), (0.35, "0.35"), (1234.56, "1,234.6"), (1 / 3, "0.3333")]
)
def test_number(value, text):
    assert number(value) == text
