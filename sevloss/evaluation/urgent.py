"""Whether an answer sends the patient to emergency care: a list of expressions in Modern Standard Arabic and
the dialects of the sample.

On doctors' real replies its precision is about 0.81 and its recall at most 0.73; of its 115 hits in
data/sample.jsonl 35 are advice for the case that things get worse. It describes a model, it is no judgement.
"""

import re
import unicodedata

# The patterns are written as `urgent` spells texts: ا for أ إ آ, ي for ى ئ, و for ؤ, ه for ة, no ء, and a
# full stop between spaces for punctuation. Up to three words may lie between a place and its haste.
_PREFIX = "[وف]?(?:ال|لل|[بكعف]ال|[لبعف])?"
_HOSPITAL = "(?:مستشفي|مشفي|سبيطار)"
_DOCTOR = "(?:طبيب|دكتور|حكيم)[كه]?"
_HASTE = ("(?:فورا|حالا|بسرعه|عاجلا|بشكل عاجل|علي الفور|في الحال|(?:ب|في |ف )اسرع وقت"
          "|(?:بلا|دون|بدون|من غير) (?:تاخير|تاجيل))")
_NOW = f"(?:الان|دلوقتي?|هسه|الحين|هلق|هلا|دابا|دروك|توا|دغري|{_HASTE})"
_BETWEEN = r"(?: \w+){0,3} "
EMERGENCY = (
    # طوراي is a frequent slip; اسعاف اولي is first aid
    f"{_PREFIX}(?:طواري|طوراي|مستعجلات|استعجالات|اسعاف(?! (?:ال)?اولي))",
    f"{_PREFIX}(?:حمايه|وقايه) المدنيه",
    f"{_PREFIX}مركز (?:ال)?سموم",
    f"[وفلب]?اقرب {_HOSPITAL}",
    f"{_PREFIX}{_HOSPITAL}{_BETWEEN}{_NOW}",
    f"{_NOW}{_BETWEEN}{_PREFIX}{_HOSPITAL}",
    f"{_PREFIX}{_DOCTOR}{_BETWEEN}{_HASTE}",
    f"{_HASTE}{_BETWEEN}{_PREFIX}{_DOCTOR}",
    rf"[وفت]?(?:توجه|اذهب|راجع|اكشف)\w{{0,2}} {_HASTE}",
    r"[وفلي]{0,2}(?:[اتين]?تصل|كلم|عيط)\w*(?: \w+){0,3} ب?(?:101|110|112|122|123|140|150|190|911|99[789])",
)

# What takes it back, just before: "no need to go to", "is no case for", or that the emergency injection or
# plan is meant.
_NO_NEED = (r"(?:لا|ليس|ليست|لست|مش|مو|مب|ما|ما في|مفيش|مافيش|مافي|ماكو|ملوش|ملهاش) "
            r"(?:داعي?|ب?حاجه|ضروره|لزوم|محتاج\w*|[تيان]حتاج\w*|[تي]ستدعي|[تي]ستلزم|حاله)"
            r"|(?:مش|مو|مب) لازم|ما?[تين]حتاج\w*")
_GOING = (r"(?: (?:الي|علي|ع|في|اي|ان|[تني](?:روح|ذهب)\w*"
          r"|(?:ال|لل|ل)?(?:ذهاب|توجه|روحه|زياره|مراجعه|اتصال|طلب)|حاله|قسم)){0,4}")
_NOT = f"(?:[وف]?(?:{_NO_NEED}){_GOING}|خطه|حقنه|ابره|دوا|حبوب|حقيبه) "
_EMERGENCY = re.compile(rf"\b(?P<not>{_NOT})?(?:{'|'.join(EMERGENCY)})\b")

_SPELLING = str.maketrans("ىةٱ", "يها", "ء")
_DIGITS = str.maketrans("٠١٢٣٤٥٦٧٨٩۰۱۲۳۴۵۶۷۸۹", 2 * "0123456789")


def urgent(text):
    """Whether the text sends to emergency care: an expression of EMERGENCY that is not taken back ("لا داعي
    للطوارئ").

    A condition counts ("إذا زاد الألم فاذهب إلى الطوارئ"), so does a report ("كنت في الطوارئ أمس"). Denials
    in other words are not seen. A hospital or a doctor alone is not enough: it takes haste, or the nearest
    hospital. Whether the advice is right, this cannot say.
    """
    letters = folded(text, "NFKD").translate(_SPELLING)  # NFKD: the hamza is a mark of its own
    spelt = " ".join(re.sub(r"[^\w\s]+|\n", " . ", letters).split())
    return any(not match["not"] for match in _EMERGENCY.finditer(spelt))


def folded(text, form="NFKC"):
    """In a Unicode normal form, lower case and ASCII digits, without diacritics and tatweel."""
    characters = unicodedata.normalize(form, text).casefold().translate(_DIGITS)
    return "".join(c for c in characters if c != "ـ" and unicodedata.category(c) != "Mn")
