"""Write arabic.json: what the Python package `arabert` makes of the texts below, for tests/test_arabic.py.

    pip install arabert==1.0.1
    python tests/golden/make_arabic.py

The texts were written for this purpose. Each is there for a step of the preprocessing, or for a trap in it.
"""

import json
from importlib.metadata import version
from pathlib import Path

try:
    from arabert.preprocess import ArabertPreprocessor
except ImportError:
    raise SystemExit("The golden file comes from the package `arabert`: pip install arabert==1.0.1") from None

TEXTS = [
    # plain, empty, only white space
    "عندي صداع منذ يومين",
    "",
    " \t\n",
    # 1. HTML entities: unescaped once, before everything else
    "الضغط &gt; ١٤٠ &amp; النبض &lt; ٦٠",
    "&lt;b&gt;مهم&lt;/b&gt;: لا توقف الدواء",
    "&amp;lt;b&amp;gt; و &quot;الأنسولين&quot; و &#39;جرعة&#39;",
    "سكر&nbsp;صائم&#160;١٠٠ &copy &unknown; &#1587;كر",
    "&#1617;&#1600;تشكيل من كيان &#x64E;",
    # 2, 3. diacritics and tatweel; marks outside U+064B to U+0652 stay, others become a space
    "السُّكَّريُّ مَرَضٌ مُزْمِنٌ، والعِلاجُ ضَرُورِيٌّ جِدًّا",
    "حـــــاد ـ مزمن ــ شديـد",
    "هـ\u064eـ\u064eـذا أ\u064eلم ش\u064eد\u064aـ\u0651د",
    "هٰذا الرَّحمٰن",
    "ا\u0653لام ا\u0654لم ا\u0655صابة و\u065fع",
    # 4. links, with Arabic glued on in different places
    "انظر https://example.org/drugs?id=12&lang=ar#dose للجرعة",
    "الموقع www.example.comوالرقم ٥",
    "صيدلية.example.com، ثم http://example.net/جرعات/أطفال?س=١",
    "example.comثم راجع الطبيب",
    "https://عيادة.موقع/صفحة httpوصفة wwwدواء ://",
    "المختبر https://lab:8080/نتيجة?س=1 ثم http://lab/a_b-c~d%20e=f&g?h.تحليل",
    "http:/example واحد HTTP://EXAMPLE.COM اثنان a.com ثلاثة a.org",
    "زيارة http://example.com/a_(b)،وبعدها مراجعة. ftp://example.org/file.pdf",
    "Panadol Tab.daily ثم Augmentin 10.mg ثم Cap.ya ثم v1.2.b",  # dosage notes that look like host names
    "x-y.example.org أ:z9.ab %z.ab +z.ab ~z.ab #z.ab =z.ab _z.ab z.ab:8/?&",
    "http://عexample.org ثم httpعexample.org ثم http://s.ab",
    "EXample.comعيادة wwwABC/xyz?دواء httدواء wwدواء http\nwww",
    f"www.{'a' * 256}.com و {'b' * 257}.org",  # a host name has at most 256 characters
    "...com و x.co.uk و ab.c و ab.cd و ab.abcdefg",
    # 4. e-mail addresses: most are links by then, the others go whole or in part
    "راسلنا clinic@example.com أو clinic@example.co.uk.",
    "بريدي مريم@عيادة.مثال،شكرا",
    "أ-ب@ج-د.هـ-و،ز س@ع.غ.ف،ق",
    "مريم@عيادة و m-n@host و a@1.2 و @@ و @ و a@ و @b",
    "الطبيب@example.infoعاجل user@EXAMPLE.ORG",
    # 4. names of users
    "شكرا @doctor_ali و@د_سارة و @طبيب٢٤، @a@b @-x",
    "(@nurse) «@صيدلي» @\u0650كسرة",
    # 5. tags, and line breaks inside tags
    "ألم في البطن<br />مع غثيان<br/>وقيء<BR>متكرر",
    '<p class="x">الجرعة <b>حبة</b></p><ul><li>صباحا</li></ul>',
    "< a <br /> b > بعده",
    "<<br />>ألم<br /<br />> و <> و </> و < >",
    "النبض < 60 والضغط > 140 <غير مغلق",
    "<!-- تعليق --> <a href='https://example.com'>رابط</a>",
    # 6. digits and what stands in and around numbers
    "الحرارة ٣٨٫٥ والصفائح ٢٥٠٬٠٠٠ والسكر ١٢٫٣٪",
    "من ١٢/٠٣/٢٠٢٤ إلى 2024-04-01 الساعة ٨:٣٠",
    "عمري ۳۵ سنة وطولي ۱۷۰سم",  # Persian digits are not digits here
    "５０ ² ½ ① 5² ٣½",
    # 7. repetition
    "ألمممممم شديييييد ههههه ١١١١ 1111 ۱۱۱۱",
    "أغثني!!!!! ماذا أفعل؟؟؟؟ .... ،،،، ----",
    "اه\u064e\u064e\u064eه\u064eه ااـاـا \u200b\u200b\u200b نعم\n\n\n\nلا",
    "جداااا!!؟؟ [[[[هام]]]] ((((عاجل))))",
    "AAA aaa aAaA /// ///// &&&& 😀😀😀😀 htttp://",  # repetition is undone too late to make a link
    # 8. between numbers and words
    "دواء10مجم ٣مرات لمدة٧أيام",
    "B12 و HbA1c و CA125 و 10mg و 5ml",
    "abس5 س5ab ab5س 5سab ab5cd س5س 5س5 س5س5 5س6ab abس5س5ab",
    "[5سم] [سم5] 5[سم] س[5]س5[a",
    "ورم٣×٤سم، و٢٫٥سم؛ و١٠٪ماء ٪١٠",
    "أ\u06545 5\u0654أ 5\u0653 \u06715 5\u0671",
    # 9, 10. symbols
    "ضغط 120/80 أو ١٣٠\\٨٥، نبض 72/د",
    "الفم & الأنف؛ 50% + 25% = 75% ± 1 ° × ÷ µg",
    "# * $ ^ _ ~ | ` · … – — ‑ − • ► → § © ™",
    "(التهاب [مزمن] {شديد}) «حاد» “سريع” ‘خفيف’ ‹ضعيف› „ألم‟",
    "[(غير متوازن»} “ [مستخدم] [ رابط ] [بريد",
    'قال: "لا تقلق "أبدا" " ثم \'نعم\' ثم `كود`',
    "أ.د. سارة،ط.ب/استشاري-باطنة_وكلى",
    # 10. emoji, presentation forms, invisible characters, letters that are not kept
    "😷 سعال ❤️ قلب\ufe0fنبض 👩‍⚕️ 🇪🇬 1️⃣",
    "😀",
    "❤️\ufe0f",
    "ﺍﻟﺴﻼﻡ ﻋﻠﻴﻜﻢ ﷲ ﷺ ﻻ",
    "سطر\nأول\r\nثان\tثالث\u00a0رابع\u2003خامس\u2028سادس\u3000سابع\u0085ثامن\x1cتاسع",
    "ز\u200bي\u200cر\u200dو \u200fيمين\u200e \u202bضمن\u202c \ufeff علامة ش\u00adرطة \x00 \x7f",
    "می\u200cگوید چشم پزشک کلیه ۀ ہ ے ڤ ڥ",
    "ٱلحمد ٲ ٳ ٴ ٵ ١ٱ٢ \u063b \u063f \u066d \u0670",
    "قُلْ أَعُوذُ ۖ بِرَبِّ ۗ ٱلنَّاسِ ۚ ۝ ۞ ﴿مَلِكِ﴾ ୍",
    "café naïve Straße Δοκιμή тест 药 ก",
    # for unpreprocess: quotes, dashes, decimals and ranges
    'قال الطبيب " خذ الدواء " وقال " لا تتوقف',
    "الدواء 'البديل' لا يناسبك، it's the patient's",
    "أخذ `عينة` ثم `أخرى",
    "الحالة — وهي خطيرة — تحتاج تدخلا — فورا",
    "من 10 - 20 مجم، ٣-٥ أيام، 1–2، أ - ب - ج - - د",
    "السكر 5.5 ثم 5,5 ثم 1.2.3 ثم 1,2,3 ثم 10.25.30 ثم ٣٫٥ ثم 5 . 5 ثم 1.2,3",
    "نعم. . لا ؟! : ؛ # 1 $5 $ 5 50 % @ _ أ|ب a=b a<b>c 2^3 *مهم*",
]

# What a model may write: unpreprocess alone
GENERATED = [
    "",
    "تحسن.ثم عاد الألم .اشرب ماء.",
    "الجرعة 1 .5 مجم ثم 2. 5 ثم 3.5 . 7",
    '"  كلمة  " " أ " ب " ج " "د" " "',
    "' أ ' و ` ب ` و — ج — و ' مفتوح",
    '"   " ب " ج " و "  " د " هـ "',
    "10 , 25 , 30",
    '" سطر\nأول " \t ثم   فراغ\u00a0',
    "1 . 2 . 3 , 4 , 5 و 10 . 25 . 30 و ٣ . ٥ و ۳ , ۵",
    "أ - - ب + ج = د < هـ > و @ ز \\ ح ^ ط _ ي | ك – ل",
    "( أ [ ب { ج “ د « هـ ‘ و * ز ~ ح ] ) }",
    "أ ) ب ؟ ! ، ؛ : … » · ٪ ’ ”",
    "راجع [رابط] ، أو [ بريد ] [مستخدم] .",
]

preprocessor = ArabertPreprocessor("bert-base-arabertv02")
texts = [{"text": text, "out": preprocessor.preprocess(text)} for text in TEXTS]
for row in texts:
    row["unpre"] = preprocessor.unpreprocess(row["out"])
generated = [{"out": text, "unpre": preprocessor.unpreprocess(text)} for text in GENERATED]

golden = {"source": f"arabert {version('arabert')}", "texts": texts, "generated": generated}
lines = json.dumps(golden, ensure_ascii=False, indent=1)
# Invisible characters are written as escapes, so that they are seen.
lines = "".join(c if c.isprintable() or c == "\n" else f"\\u{ord(c):04x}" for c in lines)
Path(__file__).with_name("arabic.json").write_text(lines + "\n", encoding="utf-8")
print(f"arabic.json: {len(texts)} texts, {len(generated)} generated texts")
