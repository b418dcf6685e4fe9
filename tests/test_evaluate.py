"""evaluate.py: what it answers and scores, what it keeps, how it goes on, what it refuses."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, lines, refusal
from page import Page

import evaluate
import finetune
from sevloss import InputError, checkpoint, data, severity
from sevloss.evaluation import bertscore, findings, report, scores
from sevloss.inputs import arabic, hub, tables
from sevloss.models import eos_ids, from_scratch, load_model, load_tokenizer, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluate")


@pytest.fixture(scope="module")
def table(folder, rows):
    """31 test rows and 100 others, with two specialties."""
    rows = rows + [row | {"Question": row["Question"].replace("منذ", "من")} for row in rows]
    sides = [[row for row in rows if (data.split_of(row["Question"]) == "test") == test]
             for test in (True, False)]
    rows = [row | {"Specialty": ("قلب", "جلد")[i % 2], "Ward": "ج"}
            for i, row in enumerate(sides[1][:60] + sides[0] + sides[1][60:100])]
    return write(folder / "table.jsonl", rows)


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def held_out(table):
    """Pairs of the test split."""
    return data.split_pairs(tables.read_pairs(table, needed=("complaint", "response")))["test"]


@pytest.fixture(scope="module")
def whole(tiny, folder):
    """A plain checkpoint, smaller still than `tiny`."""
    torch.manual_seed(0)
    model = from_scratch(tiny[0].raw_config | {"n_embd": 64, "n_layer": 2, "n_head": 2})
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.ndim == 2 else 1
    save_model(model, tiny[1], folder / "whole")
    return folder / "whole"


def train(out, whole, table, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)  # runs/cache
        call(finetune, "--ckpt", whole, "--data", table, "--preprocess", "arabert", "--dtype", "fp32",
             "--batch-size", 12, "--lr", 2e-3,
             "--save-every", 4, "--out", out, *arguments)
    return out


@pytest.fixture(scope="module")
def base(whole, table, folder):
    """A run that has learnt a little: some of its answers come to an end, some do not."""
    return train(folder / "base", whole, table, "--max-steps", 8)


@pytest.fixture
def run(base, tmp_path):
    """A copy of the run, to change it; nothing of it was evaluated."""
    return copy_of(base, tmp_path / "run")


def copy_of(run, to, but=("evaluation", "state")):
    return shutil.copytree(run, to, ignore=shutil.ignore_patterns(*but))


def checkpoint_of(run, to):
    """The run's model alone."""
    return copy_of(run, to, but=("evaluation", "state", "run.json", "metrics.jsonl", "validation.json"))


@pytest.fixture(scope="module")
def answered_once(base, folder):
    call(evaluate, copy_of(base, folder / "answered"), *SHORT)
    return folder / "answered"


@pytest.fixture
def answered(answered_once, tmp_path):
    """A copy of the run, evaluated as start() does it."""
    return copy_of(answered_once, tmp_path / "run", but=())


SHORT = ["--rows", 9, "--max-new-tokens", 8, "--dtype", "fp32", "--bertscore", "none"]


@pytest.fixture(scope="module", autouse=True)
def pictures():
    """Not drawn where the report is not looked at: it takes longer than the rest."""
    draw = report.draw_differences
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_differences", lambda evaluation, endpoint: None)
        yield draw


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(run, ..., arguments) -> evaluation.json, which may not hold what JSON does not have. Few rows,
    short answers."""
    monkeypatch.chdir(tmp_path)

    def start(*arguments):
        call(evaluate, *SHORT, "--out", tmp_path / "out", *arguments)
        return strict(tmp_path / "out" / "evaluation.json")
    return start


def strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.fixture
def asked(monkeypatch):
    """The prompts that a model was asked, a list per call of generate()."""
    asked, generate = [], evaluate.generate

    def listening(model, prompts, **options):
        if options["max_new_tokens"]:
            asked.append(prompts)
        return generate(model, prompts, **options)
    monkeypatch.setattr(evaluate, "generate", listening)
    return asked


def answers_of(run):
    """The one answers file of a run."""
    path, = (run / "evaluation").glob("answers-*.jsonl")
    return path


def means_of(found):
    return {(m["setting"], m["group"], m["score"]): m["value"] for m in found["means"]}


def setting_of(found, run):
    """What the setting of a run is called."""
    return next(setting["name"] for setting in found["settings"] if str(run) in setting["runs"])


# --- what is answered and scored ----------------------------------------------------------------------------

def test_likelihood_is_that_of_a_loop(run, held_out, start):
    """Of every test row, one document at a time; the NLL per token is a mean over rows, and beside it over
    tokens."""
    means = means_of(start(run, "--rows", 2000))
    answers = findings.load_answers(answers_of(run)).rows
    assert [row.row for row in answers] == [pair.row for pair in held_out]
    model, tokenizer = load_model(run), load_tokenizer(run)
    examples, _ = data.encode_pairs(held_out, tokenizer, max_length=512, eos_id=eos_ids(model)[0],
                                    preprocess="arabert")
    nll, tokens = np.zeros(len(held_out)), np.zeros(len(held_out))
    for i, row in enumerate(answers):
        ids, first = torch.from_numpy(examples[i]).long(), examples.first_target[i]
        logits = model(ids[:-1], [len(ids) - 1])[first - 1:] @ model.head_weight.T
        nll[i], tokens[i] = F.cross_entropy(logits, ids[first:], reduction="sum").item(), len(ids) - first
        assert (row.nll, row.tokens) == pytest.approx((nll[i], tokens[i]), rel=1e-4)
    groups = {"all": np.ones(len(nll))}
    groups |= {name: np.array([pair.severity == i for pair in held_out])
               for i, name in enumerate(severity.CLASSES)}
    groups |= {f"specialty: {name}": np.array([pair.specialty == name for pair in held_out])
               for name in ("قلب", "جلد")}
    for group, w in groups.items():
        assert means["run", group, "NLL"] == pytest.approx((w @ (nll / tokens)) / w.sum(), rel=1e-4)
        assert means["run", group, "NLL over tokens"] == pytest.approx((w @ nll) / (w @ tokens), rel=1e-4)
    assert {group for _, group, _ in means} == {*groups, "critical minus non-critical"}


def test_answers_are_the_models_own(run, held_out, start):
    """Greedy, from the prompt that it was trained with, with AraBERT's spaces undone; finished means that EOS
    came."""
    start(run, "--rows", 20)
    answers = findings.load_answers(answers_of(run)).rows
    model, tokenizer = load_model(run), load_tokenizer(run)
    pairs = {pair.row: pair for pair in held_out}
    for answer in answers:
        pair = pairs[answer.row]
        complaint = data.prepare(pair.complaint, "arabert")
        prompt = torch.tensor(tokenizer.encode(data.PROMPT.format(complaint=complaint)).ids)
        ids, finished = prompt, False
        while len(ids) < len(prompt) + 8 and not finished:
            token = (model(ids, [len(ids)])[-1] @ model.head_weight.T).argmax()
            finished = int(token) in eos_ids(model)
            ids = ids if finished else torch.cat([ids, token[None]])
        text = tokenizer.decode(ids[len(prompt):].tolist()).rstrip("\ufffd").strip()
        assert (answer.answer, answer.finished) == (arabic.unpreprocess(text), finished)
        assert (answer.complaint, answer.reference) == (pair.complaint, pair.response)
        assert answer.specialty == pair.specialty
        assert (answer.severity, tuple(answer.probabilities)) == (pair.severity, pair.probabilities)
    assert len({answer.answer for answer in answers}) > 5
    assert {answer.finished for answer in answers} == {True, False}


def test_two_models_and_their_report(run, start, tmp_path, monkeypatch, capsys, pictures):
    """Each is scored by its own answers; table, report and lines of rows say the same numbers; one seed gets no
    verdict, and the run is asked for that would give one."""
    monkeypatch.setattr(report, "draw_differences", pictures)
    other = load_model(run)
    with torch.no_grad():
        other.head_weight.mul_(0.7)
    save_model(other, load_tokenizer(run), tmp_path / "other")
    names, found = [str(run), str(tmp_path / "other")], start(run, tmp_path / "other", "--rows", 2000)
    means, row_scores = means_of(found), lines(tmp_path / "out" / "scores.jsonl")
    for name, kept in zip(names, (run / "evaluation", tmp_path / "out")):
        path, = kept.glob("answers-*.jsonl")
        rows = findings.load_answers(path).rows
        words = [len(scores.words(row.answer)) for row in rows]
        setting = setting_of(found, name)
        assert means[setting, "all", "words"] == pytest.approx(np.mean(words))
        assert means[setting, "all", "unfinished"] == np.mean([not row.finished for row in rows])
        assert {s["row"]: s["NLL"] for s in row_scores if s["run"] == name} == {
            row.row: pytest.approx(row.nll / row.tokens) for row in rows}
    assert means["run", "all", "NLL"] < means["other", "all", "NLL"]
    sentence = found["verdicts"][0]["sentence"]
    assert sentence.startswith("other and run differ by +")
    assert "fewer than three seeds say nothing" in sentence and "python finetune.py --seed 1 ..." in sentence
    out, printed = tmp_path / "out", capsys.readouterr().out
    table, page = (out / "table.txt").read_text(), Page((out / "report.html").read_text())
    assert table in printed + "\n" and sentence in printed and sentence in page.texts
    nll = f"{means['run', 'all', 'NLL']:.4f}"
    assert nll in table and page.tables["Main scores"][0][1][1].startswith(f"{means['run', 'all', 'NLL']:.2f}")
    assert {path.name for path in out.iterdir() if not path.name.startswith("answers-")} == {
        "table.txt", "evaluation.json", "report.html", "scores.jsonl", "generations.jsonl", "nll.png",
        "contrast.png"}


def seeds_of(run, name, coefficients, seeds=(0, 1, 2), noise=0.0):
    """Copies of a run that pass for trainings with other seeds and weights."""
    copies = []
    for seed in seeds:
        copy = copy_of(run, run.parent / f"{name}-{seed}")
        facts = hub.read_json(copy / "run.json")
        arguments = facts["arguments"] | {"seed": seed, "weighting": name}
        checkpoint.write_json(copy / "run.json", facts | {"arguments": arguments, "coefficients": coefficients})
        model = load_model(copy)
        torch.manual_seed(seed)
        with torch.no_grad():
            model.head_weight.mul_(1 + 0.01 * seed + noise)
        save_model(model, load_tokenizer(copy), copy)
        copies.append(copy)
    return copies


def test_settings_with_seeds(run, start, capsys, asked):
    """Likelihoods alone are enough for verdicts; --against names another control, also one that was not given."""
    none = seeds_of(run, "none", [1, 1, 1])
    hot = seeds_of(run, "hot", [0.5, 1, 1.5], noise=-0.5)
    arguments = ("--max-new-tokens", 0, "--rows", 2000)
    found = start(*hot, *none, *arguments)
    assert not asked and found["score_names"] == ["NLL", "NLL over tokens"]
    verdict, contrast = found["verdicts"]
    assert (found["control"], verdict["setting"], verdict["finding"]) == ("none", "hot", "is worse than")
    assert verdict["sentence"] in capsys.readouterr().out and contrast["endpoint"] == "contrast"
    found = start(*none, *hot[1:], *arguments, "--against", hot[0])
    assert (found["control"], found["verdicts"][0]["finding"]) == ("hot", "is better than")


def test_a_run_is_scored_by_its_best_step(base, table, tmp_path, start):
    """Its folder's top level, and not the last step's weights, which lie in state/."""
    run = shutil.copytree(base, tmp_path / "run")
    progress = torch.load(run / "state" / "training.pt", weights_only=True)["model"]
    better = load_model(run)
    with torch.no_grad():
        better.head_weight.mul_(1.5)
    save_model(better, load_tokenizer(run), run)
    assert not torch.equal(load_model(run).head_weight, progress["transformer.wte.weight"])
    means = means_of(start(run))
    alone = checkpoint_of(run, tmp_path / "alone")
    last = checkpoint_of(base, tmp_path / "last")
    others = means_of(start(alone, last, "--data", table))
    assert means["run", "all", "NLL"] == pytest.approx(others["alone", "all", "NLL"], rel=1e-6)
    assert abs(means["run", "all", "NLL"] - others["last", "all", "NLL"]) > 0.01


def test_how_it_draws_and_half_a_character(run, start, monkeypatch):
    """Decoding options reach generate() as they are given; what a cut left of a character is no part of the
    answer."""
    asked, tokenizer = [], load_tokenizer(run)
    ids = tokenizer.encode("راجع الطبيب").ids + tokenizer.encode("ج").ids[:1] + [tokenizer.token_to_id("Ø")]

    def generate(model, prompts, **options):
        asked.append(options)
        return [ids for _ in prompts]
    monkeypatch.setattr(evaluate, "generate", generate)
    assert tokenizer.decode(ids).endswith("\ufffd")
    start(run, "--temperature", 0.8, "--top-p", 0.9, "--seed", 7)
    assert [asked[0][name] for name in ("temperature", "top_p", "seed")] == [0.8, 0.9, 7]
    assert not any("\ufffd" in row.answer for row in findings.load_answers(answers_of(run)).rows)


def test_recipe_paper(run, monkeypatch):
    """Its prompt ends before "الاجابة:"; what the model says before that word is cut off; arguments that are
    given go before it."""
    tokenizer, calls = load_tokenizer(run), []

    def generate(model, prompts, **options):
        calls.append((prompts, options))
        return [tokenizer.encode("كلام\n\nالاجابة:\nراجع الطبيب").ids for _ in prompts]
    monkeypatch.setattr(evaluate, "generate", generate)
    for more in ([], ["--temperature", 0.3]):
        call(evaluate, run, "--recipe", "paper", "--rows", 9, "--dtype", "fp32", "--bertscore", "none", *more)
    (prompts, options), (_, colder) = calls
    assert (options["temperature"], options["max_new_tokens"], colder["temperature"]) == (0.7, 50, 0.3)
    rows = lines(run / "evaluation" / "generations.jsonl")
    assert sorted(prompts) == sorted(tokenizer.encode(f"\n{data.prepare(row['complaint'], 'arabert')}\n").ids
                                     for row in rows)
    assert [row["answers"][str(run)] for row in rows] == ["راجع الطبيب"] * 9


def test_few_rows_read_well(run, start, capsys):
    """No intervals, no verdict; also of a single row."""
    other = checkpoint_of(run, run.parent / "other")
    for rows in (9, 1):
        found = start(run, other, "--rows", rows)
        assert {m["low"] for m in found["means"]} == {None} == {v["p_holm"] for v in found["verdicts"]}
        printed = capsys.readouterr().out
        assert "nan" not in printed.lower()
        assert "None" not in printed


def test_rows_without_severity(run, start, table, rows, tmp_path):
    bare = [{"question": row["Question"], "answer": row["Answer"]} for row in rows]
    bare = write(tmp_path / "bare.jsonl", bare)
    found = start(run, "--data", bare)
    assert list(found["groups"]) == ["all"]


# --- what can be evaluated ----------------------------------------------------------------------------------

def test_every_kind_of_model(whole, table, base, tmp_path, start):
    """A LoRA run and its merged/, a plain checkpoint, and answers that were brought from elsewhere."""
    lora = train(tmp_path / "lora", whole, table, "--max-steps", 4, "--lora", 2, "--lr", 0.02, "--merge")
    start(copy_of(base, tmp_path / "base"))
    brought = answers_of(tmp_path / "base").rename(tmp_path / "brought.jsonl")
    found = start(lora, lora / "merged", whole, brought)
    names = [str(lora), str(lora / "merged"), str(whole), str(tmp_path / "base")]
    assert [setting["runs"] for setting in found["settings"]] == [[name] for name in names]
    nll = [means_of(found)[setting_of(found, name), "all", "NLL"] for name in names]
    assert nll[1] == pytest.approx(nll[0], rel=1e-4) and len({round(x, 3) for x in nll}) == 3
    assert answers_of(lora / "merged").is_file() and next((tmp_path / "out").glob("answers-whole-*.jsonl"))


def test_answers_from_elsewhere_bring_their_run(base, tmp_path, start):
    """Their settings, and not those of another run that bears the same name here."""
    for seed in (0, 1):
        copy = copy_of(base, tmp_path / f"there-{seed}")
        facts = hub.read_json(copy / "run.json")
        checkpoint.write_json(copy / "run.json", facts | {"arguments": facts["arguments"] | {"seed": seed}})
        start(f"there-{seed}")
        shutil.copy(answers_of(copy), tmp_path / f"{seed}.jsonl")
        shutil.rmtree(copy)
    copy_of(base, tmp_path / "there-1")
    other = facts | {"arguments": facts["arguments"] | {"lr": 7}}
    checkpoint.write_json(tmp_path / "there-1" / "run.json", other)
    found = start("0.jsonl", "1.jsonl")
    assert found["settings"] == [{"name": "there", "runs": ["there-0", "there-1"], "seeds": [0, 1]}]
    shutil.copy(tmp_path / "0.jsonl", tmp_path / "2.jsonl")
    found = start("0.jsonl", "2.jsonl")
    # one name for two files would be one column
    assert [s["runs"] for s in found["settings"]] == [["0.jsonl"], ["2.jsonl"]]


def test_a_table_under_another_name(run, table, start, tmp_path):
    """What was evaluated is compared, not what the file is called."""
    for name in ("one", "two"):
        start(run, "--data", shutil.copy(table, tmp_path / f"{name}.jsonl"))
        answers_of(run).rename(tmp_path / f"answers-{name}.jsonl")
    assert len(start("answers-one.jsonl", "answers-two.jsonl")["settings"]) == 2


def test_a_run_is_called_what_is_typed(run, start, tmp_path, monkeypatch, asked):
    """Also where it was answered under another name: its run.json would not be found."""
    start(run)
    monkeypatch.chdir(run)
    found = start("../run")
    assert found["settings"] == [{"name": "run", "runs": ["../run"], "seeds": [0]}]
    assert len(asked) == 1


def test_newest_run(tmp_path, monkeypatch):
    """Without arguments the newest run of finetune.py is taken, whatever its name."""
    for name, script in (("runs/balanced", "finetune.py"), ("runs/finetune-001", "finetune.py"),
                         ("runs/severity", "train_classifier.py")):
        checkpoint.write_run_json(tmp_path / name, script, {})
    for age, name in enumerate(("runs/severity", "runs/balanced", "runs/finetune-001")):
        os.utime(tmp_path / name / "run.json", (1e9 - age, 1e9 - age))
    monkeypatch.chdir(tmp_path)
    assert evaluate.newest_run() == "runs/balanced"


def test_columns_of_the_run_and_those_that_are_given(run, table, rows, tmp_path, start):
    """--columns without --data adds to what the run was trained with."""
    other = write(tmp_path / "other.jsonl", [{"ask": row["Question"], "say": row["Answer"], "kind": "x"}
                                             for row in rows])
    facts = hub.read_json(run / "run.json")
    checkpoint.write_json(run / "run.json", facts | {"table": str(other),
                                                     "columns": {"complaint": "ask", "response": "say"}})
    assert list(start(run)["groups"]) == ["all"]
    assert list(start(run, "--columns", "specialty=kind")["groups"]) == ["all", "specialty: x"]


def test_a_table_that_is_a_test_set(run, rows, start, tmp_path):
    """--split all takes every row; a run that was trained with that very table is refused, copied or not."""
    other = [row | {"Question": row["Question"].replace("منذ", "قبل")} for row in rows]
    found = start(run, "--data", write(tmp_path / "all.jsonl", other), "--split", "all", "--rows", 2000)
    assert found["groups"]["all"] == 120 and found["protocol"]["split"] == "all"


def test_repeated_complaints_are_evaluated_once(run, rows, start, tmp_path, capsys):
    """Intervals and tests count rows as independent; the spelling does not matter."""
    rows = [row | {"Question": row["Question"].replace("منذ", "قبل")} for row in rows]
    again = [row | {"Question": row["Question"] + "!!", "Answer": "نعم"} for row in rows[:20]]
    found = start(run, "--data", write(tmp_path / "all.jsonl", rows + again), "--split", "all", "--rows", 2000)
    assert found["protocol"]["rows"] == len(rows)
    assert "20 rows repeat a complaint and are left out" in capsys.readouterr().out


def test_answers_of_another_number_format(answered, start, tmp_path, capsys):
    """A file of answers is of one; that two differ is said."""
    path = answers_of(answered)
    head, *records = path.read_text(encoding="utf-8").splitlines(keepends=True)
    other = json.dumps(json.loads(head) | {"dtype": "bf16"}) + "\n"
    path.write_text(other + "".join(records[:4]), encoding="utf-8")
    refusal(evaluate, answered, *SHORT)
    assert "was begun in bf16, this would go on in fp32: --dtype bf16 goes on" in capsys.readouterr().err
    path.write_text(head + "".join(records), encoding="utf-8")
    (tmp_path / "other.jsonl").write_text(other + "".join(records), encoding="utf-8")
    notes = start(path, tmp_path / "other.jsonl")["notes"]
    assert "answers were made in different number formats: bf16, fp32" in notes


def test_the_control_in_another_spelling(answered, start, monkeypatch):
    """A run that --against names is not another one because it is written ./run."""
    other = copy_of(answered, answered.parent / "other", but=())
    assert start(answered, other, "--against", f"./{other.name}")["control"] == "other"


def test_the_table_of_a_run_from_another_folder(base, table, tmp_path, monkeypatch, capsys):
    """run.json holds the path as it was typed; it is looked for from the folders above the run."""
    run = copy_of(base, tmp_path / "work" / "runs" / "run")
    shutil.copy(table, tmp_path / "work" / "table.jsonl")
    facts = hub.read_json(run / "run.json")
    checkpoint.write_json(run / "run.json", facts | {"table": "table.jsonl"})
    monkeypatch.chdir(tmp_path)
    call(evaluate, run, *SHORT, "--max-new-tokens", 0)
    # that is the table it knows, by whatever path, and one of that name in the present folder is not
    (tmp_path / "table.jsonl").write_text("{}")
    facts |= {"table": "table.jsonl", "called_in": str(tmp_path / "work")}
    checkpoint.write_json(run / "run.json", facts | {"data_fingerprint": "of other rows"})
    call(evaluate, run, *SHORT, "--max-new-tokens", 0)
    refusal(evaluate, run, *SHORT, "--data", tmp_path / "work" / "table.jsonl", "--split", "all")
    assert "was trained on" in capsys.readouterr().err
    checkpoint.write_json(run / "run.json", facts | {"table": "gone.jsonl"})
    refusal(evaluate, run, *SHORT)
    assert "was trained on gone.jsonl, which is not here: give --data TABLE" in capsys.readouterr().err


# --- what is kept, and going on -----------------------------------------------------------------------------

CUTS = {  # (whole file, its lines) -> what a stop left of it
    "nothing": lambda whole, ends: b"",
    "half of the first line": lambda whole, ends: whole[:ends[0] // 2],
    "the first line": lambda whole, ends: whole[:ends[0]],
    "four rows": lambda whole, ends: whole[:ends[4]],
    "half a letter": lambda whole, ends: whole[:ends[4] + whole[ends[4]:].index("عندي".encode()) + 1],
    "all but the line break": lambda whole, ends: whole[:-1],
    "a row twice, as of two calls at a time": lambda whole, ends: whole[:ends[4]] + whole[ends[3]:ends[4]],
}


@pytest.mark.parametrize("cut, how", [(cut, "") for cut in CUTS]
                         + [("four rows", "--temperature 0.9 --top-p 0.95 --seed 3")])
def test_going_on_where_it_stopped(answered, start, asked, cut, how):
    """The answers are those of a call that was not stopped, and none is asked twice; nor when all are
    there."""
    how = how.split()
    if how:
        shutil.rmtree(answered / "evaluation")
        start(answered, *how)
    run, path = answered, answers_of(answered)
    whole, expected = path.read_bytes(), findings.load_answers(path).rows
    kept = CUTS[cut](whole, [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")])
    path.write_bytes(kept)
    stored = findings.read_answers(path)
    left = 9 - len(stored.rows) if stored else 9
    asked.clear()
    start(run, *how)
    assert sum(map(len, asked)) == left
    found = findings.load_answers(path).rows
    assert [row.answer for row in found] == [row.answer for row in expected]
    assert [row.nll for row in found] == pytest.approx([row.nll for row in expected], rel=1e-5)
    assert path.read_bytes().startswith(kept[:kept.rfind(b"\n") + 1])
    asked.clear()
    start(run, *how)
    assert not asked


def test_stopped_by_hand(run, start, monkeypatch, asked, capsys):
    """Ctrl-C: what was answered before stays; the longest prompts came first, and each is asked once."""
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 4)
    generate = evaluate.generate

    def stop(model, prompts, **options):
        if asked:
            raise KeyboardInterrupt
        return generate(model, prompts, **options)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(evaluate, "generate", stop)
        start(run)
    assert left.value.code == 130 and len(lines(answers_of(run))) == 1 + 4
    start(run)
    assert list(map(len, asked)) == [4, 4, 1]
    lengths = [len(prompt) for part in asked for prompt in part]
    assert lengths == sorted(lengths, reverse=True)
    assert len({tuple(prompt) for part in asked for prompt in part}) == 9


def test_a_signal_after_the_last_look(run, start, monkeypatch, capsys):
    """It ends the script as well, with its code: one that is kept would be looked at by no one."""
    look = evaluate.stop.leave_if

    def look_too_early(number, message):
        look(number, message)
        os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(evaluate.stop, "leave_if", look_too_early)
    with pytest.raises(SystemExit) as left:
        start(run)
    assert left.value.code == 143 and len(lines(answers_of(run))) == 1 + 9
    assert "stopped; what was saved before stays" in capsys.readouterr().err


def test_further_training_is_answered_anew(whole, table, tmp_path, start, asked):
    """A run is stopped, evaluated, and goes on."""
    out, saves, save_state = tmp_path / "growing", [], checkpoint.save_state

    def stop(*arguments):
        saves.append(save_state(*arguments))
        if len(saves) == 2:  # the first model is there
            raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "save_state", stop)
        train(out, whole, table, "--max-steps", 6, "--save-every", 2)
    before = means_of(start(out))
    train(out, whole, table, "--max-steps", 6, "--save-every", 2, "--resume")
    after = means_of(start(out))
    assert after["growing", "all", "NLL"] < before["growing", "all", "NLL"] and len(asked) == 2


@pytest.mark.parametrize("change, again", [
    ("--max-new-tokens 7", True), ("--max-length 90", True), ("--rows 8", True), ("--recipe paper", True),
    ("--columns specialty=Ward", True), ("--temperature 1", True), ("--top-p 0.9", True), ("--seed 1", True),
    ("--answers 0", False), ("--out new", False), ("--bertscore-layer 3", False), ("--device cpu", False),
])
def test_what_makes_new_answers(answered, start, asked, change, again):
    """What they depend on; not what they are scored with, or where the report goes."""
    call(evaluate, answered, *SHORT, *change.split())
    assert bool(asked) == again


@pytest.mark.parametrize("name, change", {
    "reference": lambda rows: [row | {"Answer": row["Answer"] + " فورا"} for row in rows],
    "label": lambda rows: [row | {"Severity": "neutral"} for row in rows],
    "specialty": lambda rows: [row | {"Specialty": "عيون"} for row in rows],
    "numbers of rows": lambda rows: [row for row in rows if data.split_of(row["Question"]) == "test"],
}.items())
def test_another_table_is_answered_anew(run, table, start, tmp_path, asked, name, change):
    """All that is kept beside an answer is of this table, also which row it is."""
    changed = shutil.copy(table, tmp_path / "changed.jsonl")
    start(run, "--data", changed)
    write(changed, change(lines(changed)))
    start(run, "--data", changed)
    assert len(asked) == 2
    expected = {pair.row: pair for pair in tables.read_pairs(changed, needed=("complaint", "response"))}
    for row in lines(max((run / "evaluation").glob("answers-*.jsonl"), key=os.path.getmtime))[1:]:
        pair = expected[row["row"]]
        assert [row[key] for key in ("complaint", "reference", "severity", "specialty")] == [
            pair.complaint, pair.response, pair.severity, pair.specialty]


def test_other_line_breaks_in_a_text(run, table, start, tmp_path):
    """U+2028, U+2029 and U+0085 end no line of JSON."""
    odd = [row | {"Question": row["Question"].replace("يوم", "يوم\u2028\u2029\x85")} for row in lines(table)]
    start(run, "--data", write(tmp_path / "odd.jsonl", odd))
    assert "\u2028" in findings.load_answers(answers_of(run)).rows[0].complaint
    path = answers_of(run)
    path.write_bytes(path.read_bytes()[:-9])
    start(run, "--data", tmp_path / "odd.jsonl")
    assert len(findings.load_answers(path).rows) == 9


# --- BERTScore ----------------------------------------------------------------------------------------------

@pytest.fixture
def loads(monkeypatch):
    """The encoders that were asked for."""
    loads, load = [], bertscore.Scorer.load
    monkeypatch.setattr(bertscore.Scorer, "load", lambda ckpt, layer, **more: loads.append((ckpt, layer))
                        or load(ckpt, layer, **more))
    return loads


def test_bertscore(answered, start, golden, loads, asked):
    """That of bert_score(); kept beside the answers, and computed anew for another encoder or block. Nothing
    is answered again."""
    encoder = shutil.copytree(golden / "bertscore", answered.parent / "encoder")
    found = start(answered, "--bertscore", encoder, "--bertscore-layer", 1)
    rows = findings.load_answers(answers_of(answered)).rows
    f1 = bertscore.bert_score([row.answer for row in rows], [row.reference for row in rows], encoder, 1)[2]
    assert means_of(found)["run", "all", "BERTScore F1"] == pytest.approx(f1.mean().item(), rel=1e-5)
    loads.clear()
    assert means_of(start(answered, "--bertscore", encoder, "--bertscore-layer", 1)) == means_of(found)
    assert not loads
    start(answered, "--bertscore", encoder, "--bertscore-layer", 2)
    start(answered, "--bertscore", shutil.copytree(encoder, answered.parent / "other" / "encoder"),
          "--bertscore-layer", 1)
    assert [layer for _, layer in loads] == [2, 1] and not asked


def test_bertscore_is_of_these_answers(answered, start, golden):
    """Not of those that stood in the file before."""
    arguments = (answered, "--bertscore", golden / "bertscore", "--bertscore-layer", 1)
    before, path = start(*arguments), answers_of(answered)
    head, *rows = lines(path)
    write(path, [head, *(row | {"answer": row["reference"]} for row in rows)])
    after = means_of(start(*arguments))["run", "all", "BERTScore F1"]
    assert after == pytest.approx(1, abs=1e-4)
    assert means_of(before)["run", "all", "BERTScore F1"] < 0.999


def test_without_a_scorer_the_rest_is_computed(answered, start, monkeypatch, capsys):
    """mBERT by default; a line says how to get it."""
    def unreachable(ckpt, layer, **options):
        assert (ckpt, layer) == ("bert-base-multilingual-cased", 9)
        raise hub.Unreachable("it is not here")
    monkeypatch.setattr(bertscore.Scorer, "load", unreachable)
    call(evaluate, answered, "--rows", 9, "--max-new-tokens", 8, "--dtype", "fp32", "--out", "out")
    printed = capsys.readouterr().out
    assert "BERTScore was not computed: it is not here. " in printed
    assert "`hf download google-bert/bert-base-multilingual-cased` gets it" in printed
    found = strict(answered.parent / "out" / "evaluation.json")
    assert {"NLL", "chrF", "BLEU", "ROUGE-L", "urgent"} < {m["score"] for m in found["means"]}
    assert "BERTScore F1" not in found["score_names"]


@pytest.mark.parametrize("encoder", ["nowhere", "{run}"])
def test_an_encoder_that_is_none(answered, start, encoder, capsys):
    """A wrong name, a language model: a note that says so, without advice that does not help."""
    found = start(answered, "--bertscore", encoder.format(run=answered))
    assert "BERTScore F1" not in found["score_names"]
    assert found["notes"][0].startswith("BERTScore was not computed: ")
    assert "hf download" not in found["notes"][0]


def test_none_for_tiny(run, whole, start, loads):
    """Unless it is asked for, or another model is among them."""
    def find(*names, expected):
        loads.clear()
        call(evaluate, *names, "--rows", 9, "--max-new-tokens", 8, "--dtype", "fp32", "--out", "out")
        assert loads == expected
    facts = hub.read_json(run / "run.json")
    checkpoint.write_json(run / "run.json", facts | {"arguments": facts["arguments"] | {"ckpt": "tiny"}})
    find(run, expected=[])

    def refuse(ckpt, **options):
        raise InputError("none here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bertscore, "load_model", refuse)
        find(run, whole, expected=[("bert-base-multilingual-cased", 9)])


# --- refusals -----------------------------------------------------------------------------------------------

@pytest.fixture
def kinds(base, answered, table, rows, golden, tmp_path, start):
    """name -> path, to stand in for {name} in the arguments below."""
    run = answered
    answers, other = answers_of(run), tmp_path / "other.jsonl"
    start(run, "--max-new-tokens", 7)
    other.write_bytes(max((run / "evaluation").glob("answers-*.jsonl"), key=os.path.getmtime).read_bytes())
    whole = answers.read_bytes()
    head, *lines_of = whole.splitlines(keepends=True)  # of bytes, at line feeds alone
    changed = {"rows": lines_of[:-1], "half": [*lines_of[:3], b'{"row": ', *lines_of[3:]],
               "text": ["\n".encode("utf-16")] + lines_of}
    for name, parts in changed.items():
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join([head, *parts]))
    (tmp_path / "headless.jsonl").write_bytes(b"".join(lines_of))
    references = [json.loads(head) | {"protocol": json.loads(head)["protocol"] | {"fingerprint": "0"}},
                  *map(json.loads, lines_of)]
    write(tmp_path / "references.jsonl", references)
    other_model = checkpoint_of(base, tmp_path / "model")
    (checkpoint_of(base, tmp_path / "broken") / "config.json").write_text("{")
    old = copy_of(base, tmp_path / "old")
    checkpoint_of(base, old / "best")
    rule = copy_of(base, tmp_path / "rule")
    checkpoint.write_json(rule / "run.json", hub.read_json(rule / "run.json") | {"split_rule": 0})
    checkpoint_of(base, rule / "merged")
    torn = copy_of(base, tmp_path / "torn")
    (torn / "run.json").write_text('{"script": "finet')
    typed = copy_of(base, tmp_path / "typed")
    checkpoint.write_json(typed / "run.json", hub.read_json(typed / "run.json") | {"arguments": "x"})
    (checkpoint_of(base, tmp_path / "empty") / "model.safetensors").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    return {"model": other_model, "run": run, "answers": answers, "table": table,
            "copied": shutil.copy(table, tmp_path / "copied.jsonl"),
            "bert": golden / "bertscore", "few": write(tmp_path / "few.jsonl", rows[:2]),
            "here": tmp_path}


REFUSED = [
    ("{run} {run}", "is given twice"),
    ("{run} {run}/", "is given twice"),
    ("{model} {here}/../{here.name}/model", "is given twice"),
    ("{here}/old", "its best model is in"),
    ("{here}/rule", "was made with split rule"),
    ("{here}/rule/merged", "was made with split rule"),
    ("{here}/nowhere", "is neither a folder"),
    ("{here}/broken --data {table}", "cannot be used"),
    ("{here}/torn", "cannot be used"),
    ("{here}/typed --data {table}", "run.json cannot be used"),  # before anything is answered
    ("{here}/empty --data {table}", "model.safetensors cannot be used"),
    ("{bert} --data {table}", "is no causal language model"),
    ("{run} --max-new-tokens 257", "leaves too little of 512 tokens for the complaint: 256 at most"),
    ("{run} --max-length 14", "leaves too little of 14 tokens"),
    ("{run} --max-length 8 --max-new-tokens 4", "too few for a prompt"),
    ("{run} --rows 0", "--rows must be positive"),
    ("{run} --top-p 0", "--top-p must be positive"),
    ("{run} --temperature -1", "--temperature must be at least 0"),
    ("{run} --columns specialty", "ROLE=COLUMN"),
    ("{run} --data {here}/nowhere.csv", "no such file"),
    ("{run} --data {few}", "none of its complaints falls into the test split"),
    ("{run} --split all", "would score what it has seen"),
    ("{run} --split all --data {copied}", "would score what it has seen"),
    ("{answers} {here}/other.jsonl", "evaluated with different max_new_tokens: 8 and 7"),
    ("{answers} {here}/references.jsonl",
     "evaluated with different rows or references: evaluate both in one call"),
    ("{answers} {model} --data {table} --rows 8", "evaluated with different rows: 9 and 8"),
    ("{answers} {model} --data {table} --temperature 0.5",
     "evaluated with different temperature: 0.0 and 0.5"),
    ("{here}/rows.jsonl", "is not finished"),
    ("{here}/empty.jsonl", "is not finished"),
    ("{here}/headless.jsonl", "cannot be used"),
    ("{here}/half.jsonl", "cannot be used"),
    ("{here}/text.jsonl", "cannot be used"),
    ("{run}/model.safetensors", "cannot be used"),
    ("{table}", "if evaluate.py wrote it, remove it and call again"),
]


def test_refused_in_one_line(kinds, capsys, asked):
    """With exit code 2, before anything is answered."""
    for arguments, message in REFUSED:
        capsys.readouterr()
        refusal(evaluate, *SHORT, *arguments.format(**kinds).split())
        error = capsys.readouterr().err.rpartition("\r")[2]  # after the bar
        error = error[error.index("error: "):]
        assert error.count("\n") == 1 and message in error, arguments
        assert not asked


def test_no_run_yet(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refusal(evaluate)
    assert capsys.readouterr().err == ("error: there is no run yet: python finetune.py makes one, or name a "
                                       "run or checkpoint\n")
