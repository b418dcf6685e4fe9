"""From answers to findings, on made-up answers: means, intervals, verdicts and when there are none, which runs
are one setting."""

import json
import math

import numpy as np
import pytest

from sevloss import severity
from sevloss.evaluation import compare, findings, scores
from sevloss.evaluation.findings import Answer, Answers, evaluate, settings_of

PROTOCOL = {"table": "t.csv", "rows": 60, "fingerprint": "0", "split": "test", "max_new_tokens": 8, "temperature": 0.0,
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


def found(*answers, bertscores=None, notes=None, against=None):
    """What evaluation.json would hold."""
    return evaluate(list(answers), bertscores or {}, [] if notes is None else notes, against).to_json()


def seeds_of(name, seeds=(0, 1, 2), shift=0.0, first=0, coefficients=(0.5, 1.0, 1.5), rows=60, **arguments):
    """Answers of a run per seed, called name-0 and so on; answers of a seed differ by `first`."""
    runs = []
    for seed in seeds:
        run = run_of(seed=seed, name=name, **arguments) | {"coefficients": list(coefficients)}
        runs.append(answers_of(f"{name}-{seed}", run, rows, shift, seed=first + seed))
    return runs


CONTROL = (1.0, 1.0, 1.0)


def many_critical(answers, change=0.0):
    """The same with 30 non-critical and 30 critical rows, whose NLL per token is `change` higher."""
    for a in answers:
        for row in a.rows:
            row.severity = 0 if row.row < 30 else 2
            row.nll += change * row.tokens * (row.row >= 30)
    return answers


def lookup(entries, *keys):
    """{(setting or a, b; group; score): entry}"""
    return {tuple(entry[key] for key in keys): entry for entry in entries}


# --- means --------------------------------------------------------------------------------------------------

def test_means_by_hand():
    """Every score, in every group: NLL per token as a mean over rows, and beside it sums over sums."""
    a, f1 = answers_of("a"), np.linspace(0.5, 0.9, 60)
    means = lookup(found(a, bertscores={"a": f1})["means"], "group", "score")
    rows, texts = a.rows, [r.answer for r in a.rows]
    columns = {"NLL": [r.nll / r.tokens for r in rows], "BERTScore F1": f1,
               "chrF": [scores.CHRF2.sentence_score(r.answer, [r.reference]).score for r in rows],
               "words": [len(t.split()) for t in texts],
               "unfinished": [not r.finished for r in rows]}
    groups = {"all": lambda r: 1, "neutral": lambda r: r.severity == 1,
              "specialty: ب": lambda r: r.specialty == "ب"}
    for group, weight in groups.items():
        w = np.array([weight(r) for r in rows], dtype=float)
        nll = w @ [r.nll for r in rows] / (w @ [r.tokens for r in rows])
        assert means[group, "NLL over tokens"]["value"] == pytest.approx(nll)
        for score, values in columns.items():
            assert means[group, score]["value"] == pytest.approx(w @ np.asarray(values, dtype=float) / w.sum())
    contrast = means["critical minus non-critical", "NLL"]["value"]
    assert contrast == pytest.approx(means["critical", "NLL"]["value"] - means["non-critical", "NLL"]["value"])


def test_groups_and_intervals():
    """Rows per group; intervals of groups of 20 effective rows or more, Wilson's for rates: never outside [0, 1],
    never empty."""
    result = found(answers_of("a", finished=True))
    assert result["groups"] == {"all": 60, "non-critical": 20, "neutral": 30, "critical": 10,
                                "critical minus non-critical": 10,
                                **{f"specialty: {s}": 15 for s in sorted("أبجد")}}
    means = lookup(result["means"], "group", "score")
    for entry in means.values():
        assert (entry["low"] is None) == (entry["high"] is None) == (entry["rows"] < 20)
        assert entry["sd_seeds"] is None and entry["seeds"] == 0
        assert entry["low"] is None or entry["low"] <= entry["value"] <= entry["high"]
    assert list(result["score_names"])[:3] == ["NLL", "NLL over tokens", "chrF"]
    unfinished = means["all", "unfinished"]
    assert (unfinished["value"], unfinished["low"]) == (0, 0) and unfinished["high"] > 0.05


def test_predicted_classes_are_not_labels():
    """Groups of their own; no part in the contrast where there are labels; where there are none the contrast is
    by predicted class, and says so."""
    a = answers_of("a")
    for row in a.rows[:30]:
        row.severity = None
    groups = found(a)["groups"]
    assert groups["neutral"] == 20 and groups["critical"] == 10 and "non-critical" not in groups
    predicted = [f"predicted {name}" for name in severity.CLASSES]
    assert sum(groups[name] for name in predicted) == 30 and "by p(critical)" not in groups
    assert not any("minus" in name for name in groups)

    runs = [*seeds_of("none", coefficients=CONTROL, rows=200), *seeds_of("mild", first=9, rows=200)]
    for a in runs:
        for row in a.rows:
            row.severity = None
    result = found(*runs)
    likeliest = [max(range(3), key=row.probabilities.__getitem__) for row in runs[0].rows]
    assert result["groups"]["predicted critical"] == likeliest.count(2)
    assert result["groups"]["by p(critical)"] == 200 and not set(severity.CLASSES) & set(result["groups"])
    sentence = lookup(result["verdicts"], "endpoint")["contrast",]["sentence"]
    assert sentence.endswith("This is by predicted class: what the loss did, not whom it helped.")


def test_unknown_severity_and_probabilities():
    result = found(answers_of("a", severity=None, probabilities=None, specialty="", run=run_of()))
    assert list(result["groups"]) == ["all"]


def test_likelihoods_alone():
    """Without answers there are no scores of answers, and the verdicts are there."""
    runs = [*seeds_of("none", coefficients=CONTROL), *seeds_of("mild", first=9)]
    for a in runs:
        a.protocol["max_new_tokens"] = 0
    result = found(*runs)
    assert result["score_names"] == ["NLL", "NLL over tokens"] and len(result["verdicts"]) == 2


def test_nothing_that_json_lacks():
    """A likelihood that overflowed is null in means and verdicts."""
    broken, *runs = [*seeds_of("none", coefficients=CONTROL), *seeds_of("mild", first=9)]
    for row in broken.rows:
        row.nll = math.nan
    result = found(broken, *runs)
    means = lookup(result["means"], "setting", "group", "score")
    assert means["none", "all", "NLL"]["value"] is None and means["mild", "all", "NLL"]["value"] > 0
    verdict = result["verdicts"][0]
    assert verdict["p_holm"] is None and verdict["finding"] == "no verdict"
    json.dumps(result, allow_nan=False)


def test_keys_of_the_json():
    """What other programs read."""
    result = found(answers_of("a"), answers_of("b", seed=1))
    assert set(result) == {"protocol", "settings", "control", "groups", "contrast", "score_names", "means",
                           "differences", "verdicts", "summary", "notes"}
    estimate = ["setting", "score", "group", "value", "low", "high", "error", "df", "rows", "seeds", "p",
                "sd_seeds"]
    assert list(result["means"][0]) == list(result["differences"][0]) == estimate
    assert list(result["verdicts"][0]) == ["setting", "control", "endpoint", "seeds", "difference", "p_holm",
                                           "detectable", "finding", "sentence"]
    assert result["settings"][0] == {"name": "a", "runs": ["a"], "seeds": [None]}


# --- verdicts -----------------------------------------------------------------------------------------------

def test_verdicts_are_on_two_endpoints_alone():
    """The seed-paired test of compare.py, Holm over what is tested, the sentence with these numbers; of all other
    scores and groups differences without p."""
    none = many_critical(seeds_of("none", coefficients=CONTROL))
    mild = many_critical(seeds_of("mild", shift=-0.3, first=5))
    result = found(*none, *mild)
    nll, contrast = result["verdicts"]
    a, b = (np.array([[row.nll / row.tokens for row in x.rows] for x in side]) for side in (none, mild))
    critical = np.arange(60) >= 30
    expected = [compare.paired_t(a, b), compare.paired_t(a, b, critical, ~critical)]
    for verdict, test, p in zip((nll, contrast), expected, compare.holm([test.p for test in expected])):
        assert [verdict["difference"][key] for key in ("value", "low", "high", "p")] == pytest.approx(
            [test.value, test.low, test.high, test.p])
        assert verdict["p_holm"] == pytest.approx(p)
        assert verdict["detectable"] == pytest.approx(compare.detectable_difference(test, 0.05 / 2))
        assert verdict["seeds"] == [0, 1, 2]
    assert nll["finding"] == "is better than" and contrast["finding"] == "is not distinguishable from"
    assert nll["sentence"].startswith(f"mild is better than none in NLL: {expected[0].value:+.2f} [")
    assert f"A difference of {nll['detectable']:.2g} would be found in 60 to 80% of such cases." in nll["sentence"]
    assert {entry["p"] for entry in result["differences"]} == {None}
    assert result["summary"] == [
        "How well the model foresees what doctors wrote: mild is better than none.",
        "Whether it shifts towards critical complaints: mild is not distinguishable from none."]


def test_findings_are_corrected_for_all_that_is_tested():
    """p = 0.03 alone would be one; beside two other tests it is none."""
    verdicts = []
    for p in (0.03, 0.001, 0.04, math.nan):
        difference = compare.Estimate(-1.0, -2.0, -0.1, 0.4, 5.0, 60.0, seeds=3, p=p)
        verdicts.append(findings.Verdict("mild", "none", "NLL", [0, 1, 2], difference))
    findings.judge(verdicts, {}, None)
    assert [v.finding for v in verdicts] == [findings.NO_DIFFERENCE, "is better than", findings.NO_DIFFERENCE,
                                             "no verdict"]
    assert [v.p_holm for v in verdicts[:3]] == pytest.approx([0.06, 0.003, 0.06])


@pytest.mark.parametrize("change, finding", [(-0.5, "shifts towards critical rows against"),
                                             (0.5, "shifts away from critical rows against")])
def test_the_contrast_is_neither_better_nor_worse(change, finding):
    """It says which way, and what becomes of both classes."""
    result = found(*many_critical(seeds_of("none", coefficients=CONTROL)),
                   *many_critical(seeds_of("mild", first=5), change))
    verdict = result["verdicts"][1]
    assert verdict["finding"] == finding and f"mild {finding} none." in result["summary"][1]
    differences = lookup(result["differences"], "score", "group")
    for group in ("critical", "non-critical"):
        value = differences["NLL", group]["value"]
        assert f"{value:+.2f} [" in verdict["sentence"] and f"in {group} rows" in verdict["sentence"]
    assert "better" not in verdict["sentence"] and "worse" not in verdict["sentence"]


@pytest.mark.parametrize("seeds, command", [([0], "--seed 1 ..."), ([1], "--seed 0 ..."), ([0, 1], "--seed 2 ...")])
def test_no_verdict_without_three_seeds(seeds, command):
    """However large the difference. The command that would settle it is named."""
    result = found(*seeds_of("none", seeds, coefficients=CONTROL), *seeds_of("mild", seeds, shift=9, first=5))
    verdict = result["verdicts"][0]
    assert " differ by +" in verdict["sentence"] and f"(python finetune.py {command}" in verdict["sentence"]
    assert "fewer than three seeds say nothing about the settings" in verdict["sentence"]
    assert verdict["p_holm"] is None and verdict["finding"] == "no verdict"
    assert verdict["difference"]["low"] > 8  # an interval over rows
    name = "none" if len(seeds) > 1 else f"none-{seeds[0]}"
    assert result["summary"] == [f"No verdict: it takes three seeds in common with {name}, and 20 rows."]


def test_seeds_are_paired_by_number():
    """Whatever the order of the runs. Those that only one side has are named and left out."""
    none = seeds_of("none", (0, 1, 2, 3, 7), coefficients=CONTROL)
    mild = seeds_of("mild", (2, 1, 0, 9), shift=-0.2, first=5)
    notes = []
    result = found(*none, *mild, notes=notes)
    verdict = result["verdicts"][0]
    assert verdict["seeds"] == [0, 1, 2]
    assert notes == ["mild and none: left out, as only one of them has it: seed 3, 7, 9"]
    a, b = (np.array([[row.nll / row.tokens for row in side[i].rows] for i in order])
            for side, order in ((none, (0, 1, 2)), (mild, (2, 1, 0))))
    assert verdict["difference"]["error"] == pytest.approx(compare.paired_t(a, b).error)
    assert lookup(result["means"], "setting", "score", "group")["none", "NLL", "all"]["seeds"] == 5


def test_no_seed_in_common():
    result = found(*seeds_of("none", (0, 1, 2), coefficients=CONTROL), *seeds_of("mild", (3, 4, 5)))
    verdict, = result["verdicts"]
    assert verdict["sentence"].startswith("mild and none have no seed in common and are not compared.")
    assert result["differences"] == []
    result = found(*seeds_of("none", coefficients=CONTROL), *seeds_of("mild", (3, 4)), *seeds_of("hot", shift=2))
    assert result["summary"][0].endswith("wrote: no verdict on mild; hot is worse than none.")


def test_a_checkpoint_is_a_constant():
    """Paired with every seed; two checkpoints are no settings at all."""
    plain, runs = answers_of("gpt", shift=1), seeds_of("mild")
    verdict = found(*runs, plain)["verdicts"][0]
    assert (verdict["setting"], verdict["finding"], verdict["seeds"]) == ("gpt", "is worse than", [0, 1, 2])
    verdict = found(answers_of("gpt"), answers_of("bloom", shift=2))["verdicts"][0]
    assert verdict["finding"] == "no verdict" and "finetune.py" not in verdict["sentence"]


def test_the_control():
    """The setting with equal weights, else the first; --against names another one."""
    runs = [*seeds_of("mild"), *seeds_of("none", coefficients=CONTROL), *seeds_of("strong")]
    assert found(*runs)["control"] == "none"
    assert {v["control"] for v in found(*runs)["verdicts"]} == {"none"}
    assert found(*runs[:3], *runs[6:])["control"] == "mild"
    assert found(*runs, against="strong-1")["control"] == "strong"
    assert [v["setting"] for v in found(*runs, against="strong-1")["verdicts"]] == ["mild", "mild", "none", "none"]


def test_few_rows_get_no_verdict():
    result = found(*seeds_of("none", coefficients=CONTROL, rows=19), *seeds_of("mild", shift=9, rows=19))
    assert result["verdicts"][0]["finding"] == "no verdict"
    assert "19 rows are too few for a verdict." in result["verdicts"][0]["sentence"]


def test_likelihoods_of_other_tokens_are_not_compared():
    notes = []
    result = found(answers_of("a"), answers_of("b", seed=1), answers_of("c", tokens=9), notes=notes)
    assert {v["setting"] for v in result["verdicts"]} == {"b"}
    assert {(d["setting"], d["score"]) for d in result["differences"]} > {("b", "NLL"), ("c", "chrF")}
    assert not [d for d in result["differences"] if d["setting"] == "c" and "NLL" in d["score"]]
    assert [note[:26] for note in notes] == ["NLL of c and a is not comp"]


# --- settings -----------------------------------------------------------------------------------------------

def test_seeds_are_one_setting():
    """Its mean is that of the runs, its spread their standard deviation; three are in the interval."""
    a = [answers_of(f"a-{s}", run_of(seed=s), shift=(0.0, 0.5, 0.1)[s], seed=s) for s in range(3)]
    b = [answers_of(f"b-{s}", run_of(seed=s, weighting="mild"), shift=0.3, seed=5 + s) for s in range(2)]
    result = found(*a, *b)
    assert result["settings"] == [{"name": "a", "runs": ["a-0", "a-1", "a-2"], "seeds": [0, 1, 2]},
                                  {"name": "b", "runs": ["b-0", "b-1"], "seeds": [0, 1]}]
    each = [sum(row.nll for row in x.rows) / sum(row.tokens for row in x.rows) for x in a]
    means = lookup(result["means"], "setting", "group", "score")
    entry = means["a", "all", "NLL over tokens"]
    assert entry["value"] == pytest.approx(np.mean(each))
    assert entry["sd_seeds"] == pytest.approx(np.std(each, ddof=1))
    assert entry["seeds"] == 3 and means["b", "all", "NLL"]["seeds"] == 0


def settings(**runs):
    """{setting: runs}, for {name: run}; None is a plain checkpoint. "/" is written "_"."""
    answers = [Answers(name.replace("_", "/"), {}, [], None, run or {}) for name, run in runs.items()]
    return {setting.name: setting.runs for setting in settings_of(answers)}


def test_what_is_one_setting():
    seeds = dict(r_a0=run_of(seed=0), r_a1=run_of(seed=1))
    assert settings(**seeds) == {"a": ["r/a0", "r/a1"]}
    same = dict(r_a0=run_of(seed=0, out="x", device="cuda:0", data="t.csv", classifier="runs/c"),
                r_a1=run_of(seed=1, out="y", device="cuda:1", data="./t.csv", classifier="./runs/c"))
    assert settings(**same) == {"a": ["r/a0", "r/a1"]}  # the fingerprint says that the data was the same
    for key in ("lr", "weighting", "fingerprint", "ckpt", "dtype"):
        other = {key: "other"}
        found = settings(r_a0=run_of(seed=0), r_a1=run_of(seed=1, **other))
        assert list(found.values()) == [["r/a0"], ["r/a1"]], other
    # one seed twice is no two seeds
    assert settings(r_a0=run_of(), r_copy=run_of()) == {"a0": ["r/a0"], "copy": ["r/copy"]}
    assert settings(r_a0=None, r_a1=None) == {"a0": ["r/a0"], "a1": ["r/a1"]}  # plain checkpoints
    assert list(settings(r_a0=run_of(seed=0), r_a1=run_of(seed=1), r_a2=run_of(seed=1), x=None).values()) == [
        ["r/a0", "r/a1"], ["r/a2"], ["x"]]


def test_merged_models_of_several_seeds():
    """They are no further seeds of their runs."""
    runs = {f"r_a{seed}{part}": run_of(seed=seed) for part in ("", "_merged") for seed in (0, 1)}
    assert list(settings(**runs).values()) == [["r/a0", "r/a1"], ["r/a0/merged", "r/a1/merged"]]


def test_names_of_settings():
    """What the runs' names share, without the folder that all lie in; else the arguments that differ, and of a
    plain checkpoint its name; else the first run's name."""
    names = ["r_lr1e-4-0", "r_lr1e-4-1"]
    assert list(settings(**{names[0]: run_of(seed=0), names[1]: run_of(seed=1)})) == ["lr1e-4"]
    assert list(settings(**{"r_x-009": run_of(seed=0), "r_x-010": run_of(seed=1)})) == ["x"]
    assert list(settings(r_x_plain=None, r_y_plain=None)) == ["x/plain", "y/plain"]
    assert list(settings(r_x_plain=None, r_x_mild=None)) == ["plain", "mild"]
    assert list(settings(r_x=run_of(), gpt=None)) == ["r/x", "gpt"]
    runs = {"r_1": run_of(seed=0), "r_2": run_of(seed=1)}
    runs |= {f"r_{3 + seed}": run_of(seed=seed, weighting="mild", lr=1) for seed in (0, 1)}
    assert list(settings(**runs)) == ["weighting none, lr 0.001", "weighting mild, lr 1"]
    data = {"r_1": run_of(seed=0), "r_2": run_of(seed=1), "r_3": run_of(fingerprint="g", seed=0),
            "r_4": run_of(fingerprint="g", seed=1)}
    assert list(settings(**data)) == ["r/1", "r/3"]
