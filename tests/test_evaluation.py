"""From answers to findings, on made-up answers: means, intervals, comparisons, which runs are one setting,
the paper's table."""

import json
import math

import numpy as np
import pytest

from sevloss import checkpoint
from sevloss.evaluation import compare, findings, scores
from sevloss.evaluation.findings import Answer, Answers, evaluate, settings_of

PROTOCOL = {"table": "t.csv", "rows": 60, "fingerprint": "0", "max_new_tokens": 8, "temperature": 0.0,
            "top_p": 1.0, "seed": 0}


def run_of(**arguments):
    """What read_run_json gives: the arguments of finetune.py that matter here."""
    fingerprint = arguments.pop("fingerprint", "f")
    defaults = {"ckpt": "gpt", "data": "t.csv", "classifier": None, "weighting": "none", "lr": 1e-3,
                "seed": 0,
                "device": "auto"}
    return {"data_fingerprint": fingerprint, "arguments": defaults | arguments,
            "coefficients": [1.0, 1.0, 1.0]}


def answers_of(name, run=None, rows=60, shift=0.0, seed=0, tokens=None, **columns):
    """Rows of which 20 are non-critical, 30 neutral and the others critical, of four specialties. `shift`
    raises every NLL."""
    random, hard = np.random.default_rng(seed), np.random.default_rng(99)
    counts = hard.integers(3, 30, rows) if tokens is None else np.full(rows, tokens)
    nll = counts * (hard.uniform(1, 5, rows) + random.normal(0, 0.3, rows) + shift)
    p = hard.dirichlet((1, 1, 1), rows).tolist()
    answers = []
    for i in range(rows):
        row = {
            "row": i, "complaint": f"عندي صداع {i}", "reference": "راجع الطبيب فورا من فضلك",
            "severity": 0 if i < 20 else 1 if i < 50 else 2, "probabilities": p[i],
            "specialty": "أبجد"[i % 4], "answer": "راجع الطبيب" if random.random() < 0.5 else "لا أعرف ما بك",
            "finished": bool(random.random() < 0.5), "nll": nll[i], "tokens": int(counts[i]),
        }
        answers.append(Answer(**row | columns))
    return Answers(name, PROTOCOL | {"rows": rows}, answers, None, run or {})


def found(*answers, bertscores=None, notes=None):
    """What evaluation.json would hold."""
    return evaluate(list(answers), bertscores or {}, [] if notes is None else notes).to_json()


def lookup(entries, *keys):
    """{(setting or a, b; group; score): entry}"""
    return {tuple(entry[key] for key in keys): entry for entry in entries}


# --- means --------------------------------------------------------------------------------------------------

def test_means_by_hand():
    """Every score, in every group: sums over sums, with the rows' tokens below NLL alone."""
    a, f1 = answers_of("a"), np.linspace(0.5, 0.9, 60)
    means = lookup(found(a, bertscores={"a": f1})["means"], "group", "score")
    rows, texts = a.rows, [r.answer for r in a.rows]
    columns = {"BERTScore F1": f1, "chrF": scores.chrf(texts, [r.reference for r in rows]),
               "words": [len(t.split()) for t in texts],
               "unfinished": [not r.finished for r in rows]}
    groups = {"all": lambda r: 1, "neutral": lambda r: r.severity == 1,
              "by p(critical)": lambda r: r.probabilities[2],
              "specialty: ب": lambda r: r.specialty == "ب"}
    for group, weight in groups.items():
        w = np.array([weight(r) for r in rows], dtype=float)
        nll = w @ [r.nll for r in rows] / (w @ [r.tokens for r in rows])
        assert means[group, "NLL"]["mean"] == pytest.approx(nll)
        assert means[group, "perplexity"]["mean"] == pytest.approx(math.exp(nll))
        for score, values in columns.items():
            assert means[group, score]["mean"] == pytest.approx(w @ np.asarray(values, dtype=float) / w.sum())


def test_groups_and_intervals():
    """Rows per group; intervals of groups of 20 rows or more, around the mean; perplexity's are those of
    NLL."""
    result = found(answers_of("a"))
    assert result["groups"] == {"all": 60, "non-critical": 20, "neutral": 30, "critical": 10,
                                "by p(critical)": 60,
                                **{f"specialty: {s}": 15 for s in sorted("أبجد")}}
    means = lookup(result["means"], "group", "score")
    for (group, _), entry in means.items():
        assert (entry["low"] is None) == (entry["high"] is None) == (result["groups"][group] < 20)
        assert entry["sd_seeds"] is None
        assert entry["low"] is None or entry["low"] <= entry["mean"] <= entry["high"]
    nll, perplexity = means["all", "NLL"], means["all", "perplexity"]
    assert nll["low"] < nll["mean"] < nll["high"]
    for key in ("low", "high"):
        assert perplexity[key] == pytest.approx(math.exp(nll[key]))
    assert list(result["score_names"])[:3] == ["NLL", "perplexity", "chrF"]


def test_unknown_severity_and_probabilities():
    result = found(answers_of("a", severity=None, probabilities=None, specialty="", run=run_of()))
    assert list(result["groups"]) == ["all"] and result["runs"]["a"]["weights"] == []


def test_scores_of_rows():
    """NLL per token, all others as they are."""
    a, b = answers_of("a"), answers_of("b", seed=1)
    columns = evaluate([a, b], {}, []).row_scores
    assert columns["b"]["NLL"][25] == pytest.approx(b.rows[25].nll / b.rows[25].tokens)
    assert columns["a"]["words"].tolist() == [len(row.answer.split()) for row in a.rows]


def test_nothing_that_json_lacks():
    """A likelihood that overflowed is null in means and comparisons."""
    result = found(answers_of("a", nll=math.nan), answers_of("b"))
    means = lookup(result["means"], "setting", "group", "score")
    comparisons = lookup(result["comparisons"], "group", "score")
    assert means["a", "all", "NLL"]["mean"] is means["a", "all", "perplexity"]["mean"] is None
    assert comparisons["all", "NLL"]["p_holm"] is None and comparisons["all", "chrF"]["p_holm"] <= 1
    assert means["b", "all", "NLL"]["mean"] > 0
    json.dumps(result, allow_nan=False)


def test_keys_of_the_json():
    """What other programs read."""
    result = found(answers_of("a"), answers_of("b", seed=1))
    assert set(result) == {"protocol", "settings", "groups", "score_names", "lower_is_better", "means",
                           "comparisons", "paper_table", "notes", "runs"}
    assert list(result["means"][0]) == ["setting", "score", "group", "mean", "low", "high", "sd_seeds"]
    assert list(result["comparisons"][0]) == ["a", "b", "score", "group", "difference", "low", "high", "p",
                                              "p_holm", "sentence"]
    assert result["settings"][0] == {"name": "a", "runs": ["a"]}
    assert set(result["runs"]["a"]) == {"metrics", "validation", "weights"}


# --- comparisons --------------------------------------------------------------------------------------------

def test_comparison_of_two():
    """b minus a, paired; the interval and p of compare.py; Holm over all of them; the sentence is about these
    numbers."""
    a, b = answers_of("a"), answers_of("b", shift=0.25, seed=1)
    result = found(a, b)
    comparisons = lookup(result["comparisons"], "group", "score")
    means = lookup(result["means"], "setting", "group", "score")
    # 10 critical rows are too few, and specialties are not compared
    groups = ["all", "non-critical", "neutral", "by p(critical)"]
    assert {group for group, _ in comparisons} == set(groups)
    assert {score for _, score in comparisons} == set(result["score_names"]) - {"perplexity"}
    for (group, score), entry in comparisons.items():
        mean_a, mean_b = (means[setting, group, score]["mean"] for setting in "ab")
        assert entry["difference"] == pytest.approx(mean_b - mean_a)
    nll = [np.array([row.nll for row in x.rows]) for x in (a, b)]
    tokens = [row.tokens for row in a.rows]
    expected = compare.compare_settings(nll[0][None], nll[1][None], tokens)
    entry = comparisons["all", "NLL"]
    assert [entry[key] for key in ("difference", "low", "high", "p")] == pytest.approx(list(expected))
    corrected = compare.holm([c["p"] for c in result["comparisons"]])
    assert [c["p_holm"] for c in result["comparisons"]] == pytest.approx(corrected.tolist())
    interval = entry["low"], entry["high"]
    expected = compare.sentence("a", "b", "NLL", entry["difference"], interval, entry["p_holm"])
    assert entry["sentence"] == expected
    assert entry["sentence"].startswith("b is worse than a in NLL by 0.2")
    assert "NLL (neutral)" in comparisons["neutral", "NLL"]["sentence"]


def test_every_pair_once():
    comparisons = found(*[answers_of(name, seed=i) for i, name in enumerate("abc")])["comparisons"]
    assert list(dict.fromkeys((c["a"], c["b"]) for c in comparisons)) == [("a", "b"), ("a", "c"), ("b", "c")]


def test_a_large_family_can_still_differ():
    """With 10,000 resamples the least p is 0.0002: times several hundred comparisons, nothing could ever be
    distinguished."""
    models = [answers_of(f"run {name}", rows=25, shift=i, seed=i) for i, name in enumerate("abcdef")]
    comparisons = found(*models)["comparisons"]
    assert len(comparisons) * 0.0002 > 0.05
    assert all(c["p_holm"] < 0.05 for c in comparisons if (c["score"], c["group"]) == ("NLL", "all"))


def test_few_rows_are_not_compared():
    """One note, not a line per score."""
    notes = []
    assert found(answers_of("a", rows=19), answers_of("b", rows=19), notes=notes)["comparisons"] == []
    assert notes == ["Differences are not tested: there are fewer than 20 rows"]
    notes = []
    assert found(answers_of("a", rows=20), answers_of("b", rows=20), notes=notes)["comparisons"]
    assert notes == []
    assert found(answers_of("a", rows=5), notes=notes)["comparisons"] == notes == []


def test_likelihoods_of_other_tokens_are_not_compared():
    notes = []
    result = found(answers_of("a"), answers_of("b", seed=1), answers_of("c", tokens=9), notes=notes)
    pairs = {(c["a"], c["b"]) for c in result["comparisons"] if c["score"] == "NLL"}
    assert pairs == {("a", "b")}
    assert {(c["a"], c["b"]) for c in result["comparisons"]} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert [note[:26] for note in notes] == ["NLL of a and c is not comp", "NLL of b and c is not comp"]


# --- settings -----------------------------------------------------------------------------------------------

def test_seeds_are_one_setting():
    """Its mean is that of the runs, its spread their standard deviation; and seeds are resampled in
    comparisons."""
    a = [answers_of(f"a-{s}", run_of(seed=s), shift=(0.0, 0.5, 0.1)[s], seed=s) for s in range(3)]
    b = [answers_of(f"b-{s}", run_of(seed=s, weighting="mild"), shift=0.3, seed=5 + s) for s in range(2)]
    result = found(*a, *b)
    assert result["settings"] == [{"name": "a", "runs": ["a-0", "a-1", "a-2"]},
                                  {"name": "b", "runs": ["b-0", "b-1"]}]
    each = [sum(row.nll for row in x.rows) / sum(row.tokens for row in x.rows) for x in a]
    means = lookup(result["means"], "setting", "group", "score")
    assert means["a", "all", "NLL"]["mean"] == pytest.approx(np.mean(each))
    assert means["a", "all", "NLL"]["sd_seeds"] == pytest.approx(np.std(each, ddof=1))
    assert means["a", "all", "perplexity"]["sd_seeds"] is None
    values = [np.array([[row.nll for row in x.rows] for x in side]) for side in (a, b)]
    expected = compare.compare_settings(*values, [row.tokens for row in a[0].rows])
    entry = lookup(result["comparisons"], "group", "score")["all", "NLL"]
    assert [entry[key] for key in ("difference", "low", "high", "p")] == pytest.approx(list(expected))


def settings(**runs):
    """{setting: runs}, for {name: run}; None is a plain checkpoint. "/" is written "_"."""
    answers = [Answers(name.replace("_", "/"), {}, [], None, run or {}) for name, run in runs.items()]
    return {setting.name: setting.runs for setting in settings_of(answers)}


def test_what_is_one_setting():
    seeds = dict(r_a0=run_of(seed=0), r_a1=run_of(seed=1))
    assert settings(**seeds) == {"r/a": ["r/a0", "r/a1"]}
    same = dict(r_a0=run_of(seed=0, out="x", device="cuda:0", data="t.csv", classifier="runs/c"),
                r_a1=run_of(seed=1, out="y", device="cuda:1", data="./t.csv", classifier="./runs/c"))
    assert settings(**same) == {"r/a": ["r/a0", "r/a1"]}  # the fingerprint says that the data was the same
    for key in ("lr", "weighting", "fingerprint", "ckpt", "dtype"):
        other = {key: "other"}
        found = settings(r_a0=run_of(seed=0), r_a1=run_of(seed=1, **other))
        assert list(found.values()) == [["r/a0"], ["r/a1"]], other
    # one seed twice is no two seeds
    assert settings(r_a0=run_of(), r_copy=run_of()) == {"r/a0": ["r/a0"], "r/copy": ["r/copy"]}
    assert settings(r_a0=None, r_a1=None) == {"r/a0": ["r/a0"], "r/a1": ["r/a1"]}  # plain checkpoints
    assert list(settings(r_a0=run_of(seed=0), r_a1=run_of(seed=1), r_a2=run_of(seed=1), x=None).values()) == [
        ["r/a0", "r/a1"], ["r/a2"], ["x"]]


def test_merged_models_of_several_seeds():
    """They are no further seeds of their runs."""
    runs = {f"r_a{seed}{part}": run_of(seed=seed) for part in ("", "_merged") for seed in (0, 1)}
    assert list(settings(**runs).values()) == [["r/a0", "r/a1"], ["r/a0/merged", "r/a1/merged"]]


def test_names_of_settings():
    """What the runs' names share; else the arguments that differ, and of a plain checkpoint its name; else
    all names."""
    names = ["r_lr1e-4-0", "r_lr1e-4-1"]
    assert list(settings(**{names[0]: run_of(seed=0), names[1]: run_of(seed=1)})) == ["r/lr1e-4"]
    assert list(settings(**{"r_x-009": run_of(seed=0), "r_x-010": run_of(seed=1)})) == ["r/x"]
    runs = {"r_1": run_of(seed=0), "r_2": run_of(seed=1)}
    runs |= {f"r_{3 + seed}": run_of(seed=seed, weighting="mild", lr=1) for seed in (0, 1)}
    assert list(settings(**runs)) == ["weighting none, lr 0.001", "weighting mild, lr 1"]
    assert list(settings(**runs, base=None)) == ["weighting none, lr 0.001", "weighting mild, lr 1", "base"]
    assert list(settings(r_1=run_of(seed=0), r_2=run_of(seed=1))) == ["r/1, r/2"]
    both = {name: run | {"data_fingerprint": run["arguments"]["weighting"]} for name, run in runs.items()}
    # a fingerprint says nothing to people
    assert list(settings(**both)) == ["weighting none, lr 0.001", "weighting mild, lr 1"]
    data = {"r_1": run_of(seed=0), "r_2": run_of(seed=1), "r_3": run_of(fingerprint="g", seed=0),
            "r_4": run_of(fingerprint="g", seed=1)}
    assert list(settings(**data)) == ["data_fingerprint f", "data_fingerprint g"]


# --- the paper's table, and what a run brings ---------------------------------------------------------------

def test_papers_table():
    """A checkpoint a row, a weighting a column, in the paper's order; the spread between seeds; where a cell
    is taken, a row more."""
    runs = {"gpt": {}, "b0": run_of(weighting="balanced"), "b1": run_of(weighting="balanced", seed=1),
            "n": run_of(),
            "own": run_of(weighting="0.2,1,3"), "lr": run_of(lr=7), "other": run_of(ckpt="bloom")}
    f1 = dict(zip(runs, (0.60, 0.70, 0.72, 0.65, 0.71, 0.655, 0.5)))
    header, rows = found(*[answers_of(name, run, rows=3, seed=i)
                           for i, (name, run) in enumerate(runs.items())],
                         bertscores={name: [value] * 3 for name, value in f1.items()})["paper_table"]
    assert header == ["model", "base", "CE", "mild", "strong", "balanced", "0.2,1,3"]
    assert rows == [["gpt", "60.00", "65.00", "", "", "71.00 ± 1.41", "71.00"],
                    ["gpt (lr)", "", "65.50", "", "", "", ""],
                    ["bloom", "", "50.00", "", "", "", ""]]
    assert found(answers_of("a", rows=3))["paper_table"] is None


def test_curves_and_weights(tmp_path):
    """Of the run's folder, also for its merged/; weights by its coefficients; no curves of another run that
    bears its name here, nor of what else lies in its folder."""
    run = tmp_path / "run"
    checkpoint.write_run_json(run, "finetune.py", run_of()["arguments"], data_fingerprint="f",
                              coefficients=[0.0, 1.0, 2.0])
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    (run / "validation.json").write_text("[[2, 3.5]]")
    (run / "merged").mkdir()
    for name in (run, run / "merged"):
        a = answers_of(str(name), findings.read_run_json(name), rows=3)
        record = found(a)["runs"][a.name]
        assert record["metrics"] == [{"step": 1}, {"step": 2}] and record["validation"] == [[2, 3.5]]
        assert record["weights"] == pytest.approx([row.probabilities[1] + 2 * row.probabilities[2]
                                                   for row in a.rows])
    a = answers_of(str(run), findings.read_run_json(run) | {"data_fingerprint": "g"}, rows=3)
    assert found(a)["runs"][a.name]["metrics"] == [] and len(found(a)["runs"][a.name]["weights"]) == 3
    assert findings.read_run_json(run / "state") == {}
