"""Likelihood of responses against a loop over examples; scores of answers against plain versions and by hand."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sevloss import data, device
from sevloss.evaluation import scores
from sevloss.evaluation.findings import Answer
from sevloss.evaluation.urgent import urgent
from sevloss.inputs import arabic, tables

CPU = device.choose("cpu", "fp32")


@pytest.fixture
def examples(rows, tiny):
    pairs = [tables.Pair(i, row["Question"], row["Answer"], None, None, "", {})
             for i, row in enumerate(rows[:20])]
    return data.encode_pairs(pairs, tiny[1], max_length=512, eos_id=0, preprocess="none")[0]


@pytest.mark.parametrize("most_tokens", [1, 200, 4096])
@torch.no_grad()
def test_response_nll_is_a_sum_over_targets(examples, tiny, most_tokens):
    """In the order of the examples, whatever the batches; the prompt does not count, EOS does."""
    model, expected = tiny[0], []
    for i in range(len(examples)):
        ids = torch.from_numpy(examples[i]).long()
        logits = model(ids, [len(ids)]) @ model.head_weight.T
        first = examples.first_target[i]
        expected.append(sum(F.cross_entropy(logits[t - 1], ids[t]).item() for t in range(first, len(ids))))
    nll = scores.response_nll(model, examples, CPU, most_tokens=most_tokens)
    assert nll.dtype == torch.float64
    torch.testing.assert_close(nll, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-4)
    assert len(set(expected)) == len(expected)  # or a wrong order would not show


def test_response_nll_of_some_rows(examples, tiny):
    """In any order; 0 for the others."""
    nll = scores.response_nll(tiny[0], examples, CPU, indices=[7, 2, 11], most_tokens=60)
    whole = scores.response_nll(tiny[0], examples, CPU)
    assert nll.nonzero().squeeze(1).tolist() == [2, 7, 11]
    torch.testing.assert_close(nll[[2, 7, 11]], whole[[2, 7, 11]], rtol=1e-5, atol=1e-4)


def test_response_nll_casts_a_weight_once(examples, tiny):
    """Not once a batch: autocast remembers it, as long as it is not in inference mode."""
    casts = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.aten._to_copy.default and arguments[0] is tiny[0].head_weight:
                casts.append(function)
            return function(*arguments, **(options or {}))
    with Watch():
        scores.response_nll(tiny[0], examples, device.choose("cpu", "bf16"), most_tokens=60)
    assert len(casts) == 1


def test_response_nll_switches_dropout_off(examples, tiny):
    model = tiny[0]
    model.train()
    scores.response_nll(model, examples, CPU)
    assert not model.training


# --- groups of rows -----------------------------------------------------------------------------------------

def groups_of(*rows):
    """rows: (label, p_c or None) -> {group: weights, minus where there is}"""
    answers = []
    for label, critical in rows:
        probabilities = None if critical is None else [0.9 - critical, 0.1, critical]
        answers.append(Answer(1, "", "", label, probabilities, "", "", True, 1.0, 1))
    return {name: [weights.tolist() for weights in group.values()]
            for name, group in scores.row_groups(answers).items()}


def test_groups_of_rows():
    """Classes by label; predicted ones apart, and no part of the contrast where there are labels."""
    assert groups_of((2, 0.5), (0, 0.8), (None, 0.0)) == {
        "all": [[1, 1, 1]], "non-critical": [[0, 1, 0]], "critical": [[1, 0, 0]],
        "predicted non-critical": [[0, 0, 1]], "critical minus non-critical": [[1, 0, 0], [0, 1, 0]]}
    assert groups_of((None, 0.8), (None, 0.0)) == {
        "all": [[1, 1]], "predicted non-critical": [[0, 1]], "predicted critical": [[1, 0]],
        "predicted critical minus predicted non-critical": [[1, 0], [0, 1]], "by p(critical)": [[0.8, 0]]}
    assert list(groups_of((None, None), (None, None))) == ["all"]


# --- answers ------------------------------------------------------------------------------------------------

def texts_score(answer, reference):
    """chrF, BLEU and ROUGE-L."""
    by_name = scores.answer_scores("", answer, reference, False)
    return [by_name[name] for name in ("chrF", "BLEU", "ROUGE-L")]


def test_every_score_of_an_answer():
    for complaint, answer, expected in (
        ("ألم في الصدر", "اذهب إلى الطوارئ", {"words": 3, "urgent": True}),
        ("سعال", " …", {"empty": True, "unfinished": True}),
        ("عندي صداع شديد منذ أسبوع كامل", "عندي صداع شديد منذ أسبوع كامل", {"words": 6, "repeats complaint": True}),
    ):
        by_name = scores.answer_scores(complaint, answer, "الى الطوارئ", "unfinished" in expected)
        nothing = {"words": 0, **dict.fromkeys(scores.RATES, False)}
        assert {name: value for name, value in by_name.items()
                if name not in ("chrF", "BLEU", "ROUGE-L")} == nothing | expected


def test_what_preprocessing_takes_away_costs_nothing():
    """Diacritics, tatweel and the shapes of digits: a model that was trained without cannot write them."""
    reference = "خُذْ حبّةً كـــل ٨ ساعات، ثم راجع الطبيب خلال ۱۴ يومًا"
    assert texts_score("خذ حبة كل 8 ساعات، ثم راجع الطبيب خلال 14 يوما", reference) == pytest.approx([100, 100, 1])
    answer = arabic.unpreprocess(arabic.preprocess(reference)).replace("۱۴", "14")
    assert scores.CHRF2.sentence_score(answer, [reference]).score < 90  # not folded


@pytest.mark.parametrize("text", ["راجع الطبيب غدًا، ولا تقلق", "نعم"])
def test_identical_arabic_text_scores_full(text):
    """Packages that delete what is not ASCII give it 0; and a short text has no 4-grams."""
    assert texts_score(text, text) == pytest.approx([100, 100, 1])


@pytest.mark.parametrize("answer, reference", [("زكام", "شلل"), ("", "شلل"), ("زكام", ""), ("", "")])
def test_unrelated_and_empty_text_scores_nothing(answer, reference):
    assert texts_score(answer, reference) == [0, 0, 0]


def test_bleu_splits_at_arabic_punctuation():
    """The last word is the same with and without a question mark: 4 of 5, 3 of 4, 2 of 3 and 1 of 2
    n-grams."""
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert texts_score("راجع طبيبك غدا صباحا؟", "راجع طبيبك غدا صباحا")[1] == pytest.approx(expected)


def test_words():
    """Diacritics, tatweel, case and punctuation do not count; the forms of alef do."""
    assert scores.words("خُذْ حبّةً، (2.5 MG) كـــل ٨ ساعات؟") == ["خذ", "حبة", "2", "5", "mg", "كل", "8",
                                                                   "ساعات"]
    assert scores.words("أإا ىي ةه") == ["أإا", "ىي", "ةه"]
    assert scores.words("؟! …") == []


def test_rouge_l_by_hand():
    """Longest common subsequence: راجع الطبيب غدا, 3 of 4 and of 5 words."""
    rouge_l = texts_score("راجع الطبيب المختص غدا", "راجع أنت الطبيب، غدًا صباحا")[2]
    assert rouge_l == pytest.approx(2 * 3 / (4 + 5))


def test_rouge_l_against_the_table():
    random = Random(0)
    for _ in range(200):
        a, b = ([random.choice("abc") for _ in range(random.randrange(90))] for _ in range(2))
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i in range(len(a)):
            for j in range(len(b)):
                table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1],
                                                                               table[i + 1][j])
        assert scores.rouge_l(a, b) == 2 * table[-1][-1] / max(1, len(a) + len(b))


@pytest.mark.parametrize("text, expected", [
    ("نعم نعم نعم نعم", True),
    ("راجع الطبيب غدا إن شاء الله راجع الطبيب غدا إن شاء الله", True),
    ("تناول الدواء بعد الأكل مع كوب ماء، واشرب السوائل واشرب السوائل واشرب السوائل واشرب السوائل", True),
    ("قرص قبل الأكل ثلاث مرات يوميا لمدة أسبوع، ثم كبسولة مساء ثلاث مرات يوميا لمدة شهر", False),
    ("نعم نعم", False),
    ("", False),
])
def test_repetitive(text, expected):
    """Loops; not a dosage that comes twice."""
    assert scores.repetitive(scores.words(text)) == expected


@pytest.mark.parametrize("text, expected", [
    ("أعاني من ألم شديد في الركبة اليمنى", True),
    ("ألم شديد في الرُّكبة اليمنى: ارتح، وخذ مسكنا", True),
    ("أنت تشكو من ألم شديد في الركبة، فارتح وخذ مسكنا وضع كمادات", False),
    ("ألم في الركبة", False),
])
def test_repeats_complaint(text, expected):
    """More than half of the words in stretches of five; a short mention is no repetition."""
    complaint = scores.words("السلام عليكم، أعاني من ألم شديد في الركبة اليمنى منذ شهر")
    assert scores.repeats_complaint(scores.words(text), complaint) == expected


URGENT = {
    "msa": ["توجّه إلى قسم الطوارئ", "اذهب فورًا إلى المستشفى", "توجه حالًا", "راجع الطبيب في أسرع وقت",
            "اتصل بالإسعاف", "اتصل على الرقم ٩٩٧",
            "إذا زاد الألم فاذهب إلى الطوارئ", "لا تتردد في الذهاب إلى الطوارئ",
            "لا داعي للانتظار، اذهب إلى الطوارئ", "الطوارىء",
            "الــطـوارئ", "اتصلوا بـ911", "اذهب إلى أقرب مستشفى"],
    "egyptian": ["روح الطوارئ دلوقتي", "كلّمي الإسعاف", "لا لازم تروح الطوارئ", "انزلوا بيه لأقرب مستشفى",
                 "اتصل ب123"],
    "gulf": ["وديه المستشفى الحين", "لطوارئ العيون"],
    "levantine": ["عالطوارئ هلق", "روح ع الإسعاف", "خدوه عالمستشفى هلق"],
    "maghrebi": ["سير للمستعجلات دابا", "روح للاستعجالات", "عيطو للحماية المدنية"],
}
NOT_URGENT = ["لا داعي للطوارئ", "ما في داعي تروح عالطوارئ", "مش محتاج طوارئ",
              "الحالة لا تستدعي الذهاب إلى الطوارئ", "ليست حالة طوارئ",
              "ماتحتاجش طوارئ", "مو لازم طوارئ", "استعمل حقنة الطوارئ", "دورة في الإسعاف الأولي",
              "صندوق الإسعافات الأولية",
              "راجع طبيب الجلدية خلال أسبوع", "اذهب إلى المستشفى لعمل أشعة", "أوقف الدواء فورًا",
              "خذ ٩١١ ملغ", ""]


@pytest.mark.parametrize("text", sum(URGENT.values(), []))
def test_urgent(text):
    assert urgent(text)


@pytest.mark.parametrize("text", NOT_URGENT)
def test_not_urgent(text):
    assert not urgent(text)


def test_urgent_on_the_sample():
    """The critical responses were written to send to emergency care, the non-critical ones were not."""
    lines = Path(__file__).parents[1].joinpath("data/sample.jsonl").read_text(encoding="utf-8").splitlines()
    found = {name: [] for name in ("critical", "non-critical")}
    for row in map(json.loads, lines):
        found.get(row["Severity"], []).append(urgent(row["Answer"]))
    assert np.mean(found["critical"]) > 0.95
    assert np.mean(found["non-critical"]) < 0.1
