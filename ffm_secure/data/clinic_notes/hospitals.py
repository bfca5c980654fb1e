"""How hospitals write: spelling, units, abbreviations, section order;
and the phrases every specialty shares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

SECTIONS = ("who", "history", "background", "drugs", "exam", "impression", "plan")

HOSPITALS = (
    "northmere",
    "calder-vale",
    "st-oswin",
    "lakeside-mercy",
    "fort-hollis",
    "pinecrest",
    "eastbrook",
    "marrow-bay",
    "greywater",
    "saint-ambry",
    "harrow-fell",
    "two-rivers",
    "copper-hill",
    "westmarch",
    "elmstead",
    "north-shoal",
)

LABS = {  # British units | American units
    "bnp": "NT-proBNP {900-6800} ng/L | NT-proBNP {900-6800} pg/mL",
    "ldl": "LDL {21-48/10} mmol/L | LDL {82-186} mg/dL",
    "chol": "cholesterol {68-112/10} mmol/L | cholesterol {264-430} mg/dL",
    "creat": "creatinine {138-410} umol/L | creatinine {16-46/10} mg/dL",
    "creat_ok": "creatinine {62-98} umol/L | creatinine {7-11/10} mg/dL",
    "k_high": "K {58-68/10} mmol/L | K {58-68/10} mEq/L",
    "na_low": "Na {122-131} mmol/L | Na {122-131} mEq/L",
    "acr": "urine ACR {38-310} mg/mmol | urine ACR {340-2700} mg/g",
    "acr_low": "urine ACR {2-9} mg/mmol | urine ACR {18-84} mg/g",
    "alb": "albumin {19-31} g/L | albumin {19-31/10} g/dL",
    "bili": "bilirubin {38-160} umol/L | bilirubin {22-94/10} mg/dL",
    "hb_low": "Hb {76-109} g/L | Hgb {76-109/10} g/dL",
    "ferritin_low": "ferritin {4-14} ug/L | ferritin {4-14} ng/mL",
    "crp": "CRP {18-164} mg/L | CRP {18-164/10} mg/dL",
    "urate": "urate {430-690} umol/L | uric acid {72-116/10} mg/dL",
    "glucose": "glucose {112-245/10} mmol/L | glucose {202-440} mg/dL",
    "a1c": "HbA1c {58-104} mmol/mol | A1c {75-117/10}%",
    "tsh_high": "TSH {12-88} mU/L | TSH {12-88} uIU/mL",
    "tsh_ok": "TSH {9-38/10} mU/L | TSH {9-38/10} uIU/mL",
    "calcium_high": "adj calcium {268-312/100} mmol/L | calcium {107-125/10} mg/dL",
    "temp": "temp {362-374/10} | temp {972-993/10} F",
    "weight": "weight {54-112} kg | weight {119-247} lb",
}

AMERICAN = {
    "oedema": "edema",
    "haem": "hem",
    "Haem": "Hem",
    "anaemia": "anemia",
    "oesoph": "esoph",
    "diarrhoea": "diarrhea",
    "apnoea": "apnea",
    "goitre": "goiter",
    "orientated": "oriented",
    "neighbours": "neighbors",
    "colour": "color",
    "melaena": "melena",
    "coeliac": "celiac",
    "orthopaed": "orthoped",
    "litre": "liter",
    "GORD": "GERD",
    "OGD": "EGD",
    "paracetamol": "acetaminophen",
    "salbutamol": "albuterol",
    "glyceryl trinitrate": "nitroglycerin",
    "bendroflumethiazide": "HCTZ",
    "co-amoxiclav": "amox-clav",
    "co-careldopa": "carbidopa-levodopa",
    "co-codamol": "acetaminophen-codeine",
    "co-trimoxazole": "TMP-SMX",
    "flucloxacillin": "cephalexin",
    "physiotherapy": "physical therapy",
    "theatre list": "OR schedule",
    "chest film": "CXR",
    "U&E": "BMP",
    "full blood count": "CBC",
    "DVLA told": "DMV form",
    "GP": "PCP",
    "sick note": "work note",
    "bloods": "labs",
    "tablets": "pills",
    "tummy": "belly",
    "carbimazole": "methimazole",
    "beclometasone": "beclomethasone",
    "ring if": "call if",
    "2 week wait": "urgent",
    "cetirizine": "cetirizine",
    "chlorphenamine": "diphenhydramine",
    "lymecycline 408 mg": "minocycline 100 mg",
    "gliclazide": "glipizide",
    "colecalciferol": "cholecalciferol",
}

SHORT_COMMON = {
    "shortness of breath": "SOB",
    "short of breath": "SOB",
    "history of": "h/o",
    "chest pain": "CP",
    "left": "L",
    "heart failure": "HF",
    "atrial fibrillation": "AF",
    "type 2 diabetes": "T2DM",
    "type 1 diabetes": "T1DM",
    "hypertension": "HTN",
    "blood pressure": "BP",
    "weeks": "wks",
    "months": "mo",
    "minutes": "min",
    "right": "R",
    "rheumatoid arthritis": "RA",
    "osteoarthritis": "OA",
    "examination": "exam",
    "follow up": "f/u",
    "without": "w/o",
    "with": "w/",
    "bilateral": "b/l",
    "depression": "depr",
    "medication": "meds",
    "symptoms": "sx",
    "review": "rv",
    "repeat": "rpt",
    "normal": "nl",
    "increase": "incr",
    "headache": "HA",
    "breathless": "SOB",
    "twice a day": "x2/d",
    "ultrasound": "USS",
    "physiotherapy": "physio",
    "prednisolone": "pred",
    "methotrexate": "MTX",
    "patient": "pt",
    "migraine": "migr",
    "referral": "ref",
    "negative": "-ve",
    "positive": "+ve",
    "discussed": "d/w pt",
    "since": "x",
}

SHORT_BRITISH = {
    "once daily": "od",
    "twice daily": "bd",
    "three times daily": "tds",
    "four times daily": "qds",
    "at night": "nocte",
    "as needed": "prn",
    "weekly": "/7",
    "abdomen": "abdo",
    "temperature": "temp",
}

SHORT_AMERICAN = {
    "once daily": "QD",
    "twice daily": "BID",
    "three times daily": "TID",
    "four times daily": "QID",
    "at night": "QHS",
    "as needed": "PRN",
    "weekly": "qwk",
    "abdomen": "abd",
    "temperature": "T",
}

SHARED_COMPLAINTS = (  # what people say, and the clinics in which they say it
    (
        "tired all the time for {2-9} months",
        "endocrinology psychiatry nephrology rheumatology cardiology pulmonology",
    ),
    ("breathless on exertion for {2-8} weeks", "cardiology pulmonology nephrology gastroenterology"),
    ("chest discomfort on and off", "cardiology gastroenterology pulmonology psychiatry rheumatology"),
    ("ankle swelling by evening", "cardiology nephrology dermatology gastroenterology orthopaedics"),
    ("headaches most weeks", "neurology psychiatry endocrinology cardiology pulmonology"),
    ("dizzy on standing", "cardiology neurology endocrinology nephrology gastroenterology"),
    (
        "weight down {3-8} kg without trying",
        "gastroenterology endocrinology psychiatry pulmonology rheumatology",
    ),
    ("poor sleep and low energy", "psychiatry pulmonology neurology endocrinology rheumatology nephrology"),
    ("numb fingers at night", "neurology orthopaedics rheumatology endocrinology"),
    ("back pain for {2-9} weeks", "orthopaedics rheumatology nephrology neurology"),
    ("joint pains, hands and knees", "rheumatology orthopaedics dermatology gastroenterology"),
    ("rash on the legs for {1-4} weeks", "dermatology rheumatology nephrology"),
    ("itching, worse at night", "dermatology nephrology gastroenterology endocrinology"),
    ("off food and nauseated", "gastroenterology nephrology psychiatry endocrinology"),
    ("palpitations in the evenings", "cardiology endocrinology psychiatry"),
    ("cough for {3-8} weeks", "pulmonology cardiology gastroenterology"),
    ("two falls this month", "neurology orthopaedics cardiology endocrinology psychiatry"),
    ("shaky hands", "neurology endocrinology psychiatry nephrology"),
    ("knee swollen for {2-9} days", "orthopaedics rheumatology"),
    ("blacked out once", "neurology cardiology psychiatry endocrinology"),
    ("low mood since diagnosis", "psychiatry dermatology neurology rheumatology pulmonology"),
    ("passing water at night {2-5} times", "endocrinology nephrology cardiology"),
    ("hair loss and dry skin", "dermatology endocrinology rheumatology"),
)

BACKGROUND = (  # a disease of another clinic, the youngest age it is given to, what it is treated with
    ("hypertension", 35, "amlodipine {5-10:5} mg once daily | ramipril 5 mg once daily"),
    ("type 2 diabetes", 35, "metformin {500-1000:500} mg twice daily | gliclazide 40 mg twice daily"),
    ("atrial fibrillation", 50, "apixaban 5 mg twice daily | bisoprolol 2.5 mg once daily"),
    ("previous MI {2-14} years ago", 48, "aspirin 75 mg once daily | atorvastatin 80 mg at night"),
    ("heart failure", 55, "furosemide 40 mg once daily | spironolactone 25 mg once daily"),
    ("COPD", 48, "tiotropium 18 mcg once daily | salbutamol as needed"),
    ("asthma", 16, "salbutamol as needed | budesonide/formoterol 2 puffs twice daily"),
    ("sleep apnoea on CPAP", 35, "CPAP nightly"),
    ("reflux", 25, "omeprazole 20 mg once daily | lansoprazole 15 mg once daily"),
    ("coeliac disease", 16, "gluten free diet"),
    ("Crohn's disease", 16, "azathioprine 100 mg once daily"),
    ("CKD stage 3a", 45, "atorvastatin 20 mg at night | losartan 50 mg once daily"),
    ("kidney stones", 30, "tamsulosin 400 mcg once daily"),
    ("hypothyroidism", 28, "levothyroxine {50-125:25} mcg once daily"),
    ("osteoporosis", 55, "alendronic acid 70 mg weekly"),
    ("migraine", 16, "sumatriptan 50 mg as needed | propranolol 40 mg twice daily"),
    ("epilepsy", 16, "levetiracetam 500 mg twice daily | lamotrigine 100 mg twice daily"),
    ("stroke {2-9} years ago", 50, "clopidogrel 75 mg once daily"),
    ("osteoarthritis both knees", 52, "paracetamol 1 g as needed | topical ibuprofen"),
    ("hip replacement {2-11} years ago", 56, "paracetamol 1 g as needed"),
    ("psoriasis", 16, "calcipotriol/betamethasone as needed"),
    ("eczema", 16, "emollient twice daily"),
    ("depression", 16, "sertraline {50-100:50} mg once daily | mirtazapine 15 mg at night"),
    ("anxiety", 16, "citalopram 20 mg once daily | propranolol 10 mg as needed"),
    ("bipolar disorder", 22, "lithium 600 mg at night | quetiapine 100 mg at night"),
    ("rheumatoid arthritis", 32, "methotrexate 15 mg weekly | hydroxychloroquine 200 mg twice daily"),
    ("gout", 38, "allopurinol {100-300:100} mg once daily"),
    ("polymyalgia", 60, "prednisolone {3-8} mg once daily"),
)  # fmt: skip

SOCIAL = (
    "lives alone | lives with partner | ex-smoker {8-45} pack years | never smoked | smokes {5-20} a day | "
    "alcohol {4-28} units a week | no drug allergies | penicillin allergy | "
    "two cats at home | independent at home"
)
SOCIAL_YOUNGER = "works nights | drives a lorry | office job | off work {2-8} weeks | two small children"
SOCIAL_OLDER = (
    "retired teacher | care home resident | carer for spouse | walks with a stick | carers twice a day"
)

ROUTINE = "nothing new since last visit | much the same symptoms | slow improvement only | fewer bad days"

GENERAL_FINDINGS = (
    "looks well | BP {112-148}/{62-88} | pulse {58-96} regular | <temp> | sats {94-99}% on air | "
    "<weight> | comfortable at rest | alert and orientated | examination unremarkable | chest clear | "
    "abdomen soft | heart sounds normal | no focal neurology | calves soft | no lymph nodes | "
    "gait steady | skin intact"
)

GENERAL_IMPRESSIONS = (
    "stable | improving | unclear cause | slow progress | unchanged | settled on current treatment | "
    "possible side effect of tablets | partial response | incomplete picture | still active | multifactorial"
)

GENERAL_PLANS = (
    "continue current medication | review in {2-6} months | review in {2-8} weeks | bloods next week | "
    "GP to continue | results by letter | discussed, happy with plan | safety net given | "
    "discharge to GP | tablets changed, see GP letter | increase dose | halve dose and review | "
    "stop new tablet | await scan report | case for MDT | written leaflet given | "
    "phone follow up in {2-6} weeks | chase outside records"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """The order and the headings of one way to write a note; an empty heading leaves the words bare."""

    order: tuple[str, ...]
    headings: Mapping[str, str]
    item: str  # between items of a section
    section: str  # between sections
    openers: tuple[str, ...]


def _layout(order: str, headings: str, item: str, section: str, openers: str) -> Layout:
    names = tuple(order.split())
    return Layout(
        names, dict(zip(names, headings.split("|"), strict=True)), item, section, tuple(openers.split("|"))
    )


_WIDE = "who history background drugs exam impression plan"
LAYOUTS = (
    _layout(_WIDE, "||PMH: |DH: |O/E: |Imp: |Plan: ", ", ", "\n", "presents with |seen today: |reports |"),
    _layout(
        "who background history exam drugs impression plan",
        "|Background |Complains of |Found: |Takes |Impression: |We agreed: ",
        "; ",
        ". ",
        "||mainly |again ",
    ),
    _layout(_WIDE, "|S: |PMH |Rx |O: |A: |P: ", ", ", "\n", "c/o |tells me |came in with |"),
    _layout(_WIDE, "|HPI: |PMHx: |Meds: |PE: |A/P: |", ", ", "\n", "p/w |presents: |endorses |here as "),
    _layout(
        "impression who history background exam drugs plan",
        "Dx: |||hx |o/e |on |to do: ",
        ", ",
        "; ",
        "||reports |says ",
    ),
    _layout(
        "who history exam impression plan drugs background",
        "|CC: |Exam: |Impression: |Recs: |Current meds: |Other: ",
        "; ",
        "\n",
        "patient reports |patient states |complaint: |",
    ),
    _layout(
        "who plan history background drugs exam impression",
        "|Action: |Story: |Past: |Tablets: |Signs: |Conclusion: ",
        ", ",
        "\n",
        "||ongoing: |new: ",
    ),
    _layout(
        _WIDE,
        "||. Background: |. On |. Exam: |. Impression: |. Plan: ",
        ", ",
        " ",
        "with |describing |seen: |reporting ",
    ),
)


@dataclass(frozen=True, slots=True)
class House:
    """One hospital's way of writing."""

    name: str
    american: bool
    lower: bool
    layout: Layout
    brevity: float  # how often a note is written in abbreviations
    abbreviations: Mapping[str, str]
    social: float  # how often social history is noted


def make_house(index: int, draw: Callable[[], float]) -> House:
    """Make hospital number `index`; its abbreviations are its own choice of those there are."""
    american = index % 8 in (3, 4, 5)
    table = {**SHORT_COMMON, **(SHORT_AMERICAN if american else SHORT_BRITISH)}
    return House(
        name=HOSPITALS[index] if index < len(HOSPITALS) else f"hospital-{index + 1}",
        american=american,
        lower=index % 8 in (2, 4),
        layout=LAYOUTS[index % len(LAYOUTS)],
        brevity=(0.35, 0.1, 0.9, 0.8, 0.95, 0.3, 0.5, 0.2)[index % 8],
        abbreviations={long: short for long, short in table.items() if draw() < 0.7},
        social=(0.3, 0.6, 0.1, 0.4, 0.05, 0.5, 0.3, 0.7)[index % 8],
    )


def _replacer(table: Mapping[str, str], *, whole_words: bool) -> Callable[[str], str]:
    keys = sorted(table, key=len, reverse=True)
    joined = "|".join(map(re.escape, keys))
    pattern = re.compile(rf"\b(?:{joined})\b" if whole_words else joined)
    return lambda text: pattern.sub(lambda match: table[match.group()], text)


_american = _replacer(AMERICAN, whole_words=False)


def writer(house: House, *, short: bool) -> Callable[[str], Sequence[str]]:
    """Give the function that turns a list "first | second" into the hospital's own wording."""
    if short and house.abbreviations:
        abbreviate = _replacer(house.abbreviations, whole_words=True)
    else:
        abbreviate = str

    def units(match: re.Match[str]) -> str:
        return LABS[match.group(1)].split(" | ")[house.american]

    def write(text: str) -> Sequence[str]:
        own = re.sub(r"<(\w+)>", units, text)
        return abbreviate(_american(own) if house.american else own).split(" | ")

    return write
