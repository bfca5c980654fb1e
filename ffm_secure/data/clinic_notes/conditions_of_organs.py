"""The vocabulary of `builtin:clinic_notes`, first half: the specialties of the inner organs.

What each specialty sees, finds, gives and plans.

Every list is written as "first | second | third". `{3-14}` draws a whole number, `{52-64/10}` one between
5.2 and 6.4, `<lab>` a laboratory value in the units of the hospital. `13# item` belongs to the first and the
third name only. Spelling here is British; hospitals rewrite it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Condition:
    """One reason for being seen: names of the impression, complaints, findings, drugs with doses, plans,
    ages.
    """

    names: str
    complaints: str
    findings: str
    drugs: str
    plans: str
    ages: tuple[int, int] = (25, 88)


CARDIOLOGY = (
    Condition(
        "heart failure, reduced ejection fraction | decompensated heart failure | HFrEF",
        "shortness of breath on one flight of stairs | sleeping on {2-4} pillows | waking at night gasping | "
        "ankle swelling worse by evening | {2-6} kg weight gain over {2-4} weeks | tired after short walks",
        "pitting oedema to mid shin | bibasal crackles | JVP raised {3-6} cm | EF {22-38}% on echo | <bnp> | "
        "displaced apex",
        "furosemide {40-80:40} mg once daily | bisoprolol {25-75:25/10} mg once daily | "
        "ramipril {25-50:25/10} mg | spironolactone 25 mg once daily | dapagliflozin 10 mg once daily | "
        "sacubitril/valsartan 24/26 mg twice daily",
        "daily weights, fluid restrict 1.5 L | repeat echo in {3-6} months | "
        "recheck renal function in {1-2} weeks | increase diuretic, ring if weight up 2 kg | "
        "heart failure nurse to titrate",
        (52, 91),
    ),
    Condition(
        "atrial fibrillation | new AF, rate {104-148} | paroxysmal AF",
        "palpitations on and off for {2-8} weeks | heart racing at rest | "
        "fluttering in chest lasting {5-50:5} minutes | light headed when standing | "
        "reduced exercise tolerance | found to have an irregular pulse at routine check",
        "irregularly irregular pulse | ECG AF no acute ST change | CHA2DS2-VASc {1-5} | "
        "heart sounds normal no murmur | LA mildly dilated on echo | <tsh_ok>",
        "apixaban 5 mg twice daily | bisoprolol {25-50:25/10} mg once daily | digoxin 125 mcg once daily | "
        "rivaroxaban 20 mg with food | flecainide 50 mg twice daily",
        "24 h tape | discuss cardioversion once anticoagulated | rate control for now | "
        "refer for ablation opinion | bleeding risk discussed, start anticoagulant",
        (48, 90),
    ),
    Condition(
        "stable angina | probable angina, CCS {1-3} | recent NSTEMI, recovering",
        "tightness across the chest on hills | chest pain on exertion eases with rest | "
        "left arm ache with walking | jaw discomfort climbing stairs | using spray {1-5} times a week | "
        "chest pressure after heavy meals",
        "ECG T wave flattening laterally | troponin {3-11} ng/L flat | heart sounds dual nil added | <ldl> | "
        "old inferior Q waves | pulses present and equal",
        "aspirin 75 mg once daily | atorvastatin {40-80:40} mg at night | "
        "glyceryl trinitrate spray as needed | ticagrelor 90 mg twice daily | "
        "amlodipine {5-10:5} mg once daily | ranolazine 375 mg twice daily",
        "CT coronary angiogram | angiogram if symptoms progress | cardiac rehab | exercise test booked | "
        "stop smoking advice, lipids in {2-3} months",
        (45, 86),
    ),
    Condition(
        "hypertension, above target | resistant hypertension | stage 2 hypertension",
        "home readings {152-178}/{88-104} | headaches in the morning | "
        "no symptoms, raised readings at work | ankles puffy since new tablet | dizzy since dose went up | "
        "blurred vision on and off",
        "BP {158-196}/{92-114} both arms | LVH by voltage on ECG | fundi grade {1-2} changes | "
        "no renal bruit | <creat_ok> | urine dip clear",
        "amlodipine {5-10:5} mg once daily | losartan {50-100:50} mg once daily | "
        "indapamide 1.5 mg once daily | ramipril {5-10:5} mg once daily | doxazosin {2-8:2} mg once daily",
        "24 h ambulatory BP | low salt, weight and alcohol advice | renin and aldosterone | "
        "U&E {1-3} weeks after change | target under 135/85 at home",
        (35, 84),
    ),
    Condition(
        "aortic stenosis, moderate | severe AS, symptomatic | valve surveillance",
        "blacked out walking uphill | breathless carrying shopping | chest tight when hurrying | "
        "no symptoms at present | near faint on exertion | slowing up over {6-18:3} months",
        "ejection systolic murmur to carotids | peak gradient {38-92} mmHg | slow rising pulse | "
        "AVA {7-14/10} cm2 on echo | soft second sound | LV function preserved",
        "furosemide 20 mg once daily | bisoprolol 1.25 mg once daily | aspirin 75 mg once daily | "
        "atorvastatin 20 mg at night",
        "echo in {6-12:6} months | heart team for TAVI work-up | dental check before valve work | "
        "report any blackout | avoid vasodilators",
        (60, 92),
    ),
)

PULMONOLOGY = (
    Condition(
        "COPD exacerbation, infective | COPD, MRC {2-4} | COPD, frequent exacerbator",
        "shortness of breath worse for {3-10} days | more sputum and it has gone green | wheeze at night | "
        "using blue inhaler {4-10} times a day | cough most mornings | breathless getting dressed",
        "widespread wheeze | FEV1 {28-62}% predicted | sats {86-92}% on air | hyperinflated chest film | "
        "prolonged expiratory phase | crackles right base",
        "prednisolone 30 mg for {5-7} days | doxycycline 100 mg once daily | tiotropium 18 mcg once daily | "
        "salbutamol 2 puffs as needed | umeclidinium/vilanterol one puff once daily | carbocisteine 750 mg",
        "pulmonary rehab | check inhaler technique | rescue pack at home | spirometry when well | "
        "sputum culture | home oxygen assessment",
        (48, 86),
    ),
    Condition(
        "asthma, poorly controlled | asthma exacerbation | cough variant asthma",
        "wheeze with cold air | chest tight at night | cough after running | woken {2-5} nights a week | "
        "short of breath around cats | missed preventer for {1-4} weeks",
        "peak flow {210-390:10} | expiratory wheeze both sides | FeNO {38-96} ppb | eosinophils {5-12/10} | "
        "talking in sentences | chest clear between attacks",
        "beclometasone {100-200:100} mcg twice daily | budesonide/formoterol 2 puffs twice daily | "
        "montelukast 10 mg at night | salbutamol as needed | prednisolone 40 mg for 5 days",
        "asthma plan given | step up preventer | peak flow diary | allergy testing | review in {2-6} weeks | "
        "check for reflux and rhinitis",
        (17, 66),
    ),
    Condition(
        "community acquired pneumonia | CAP, CURB-65 {0-2} | resolving right lower lobe pneumonia",
        "fever and sweats for {2-6} days | rusty sputum | sharp pain on breathing in | cough and off food | "
        "shivering, achy all over | more muddled than usual",
        "bronchial breathing right base | <crp> | consolidation on chest film | "
        "dull to percussion left base | sats {89-94}% on air | WCC {125-212/10}",
        "amoxicillin 500 mg three times daily | clarithromycin 500 mg twice daily | "
        "co-amoxiclav 625 mg three times daily | paracetamol 1 g four times daily | "
        "doxycycline 200 mg then 100 mg",
        "repeat chest film in 6 weeks | blood cultures | safety net if worse | fluids and rest | "
        "pneumococcal vaccine",
        (30, 90),
    ),
    Condition(
        "obstructive sleep apnoea | OSA, AHI {16-58} | likely OSA",
        "snoring, partner sees pauses | falling asleep at the wheel | morning headache | "
        "unrefreshed by sleep | up {2-4} times a night | poor concentration at work",
        "Epworth {11-20} | BMI {33-46} | neck {42-49} cm | Mallampati {3-4} | awake sats 96% | "
        "overnight dips to {72-86}%",
        "CPAP at {8-14} cm | nasal fluticasone at night | amlodipine 5 mg once daily | "
        "modafinil 100 mg in the morning",
        "sleep study | must not drive until treated | weight loss plan | mask refit | "
        "download of machine in {1-3} months",
        (30, 74),
    ),
    Condition(
        "pulmonary embolism, subsegmental | provoked PE, month {1-5} | "
        "interstitial lung disease, UIP pattern",
        "12# sudden breathlessness after long flight | 12# calf sore then breathless | "
        "3# dry cough for {4-14} months | 12# coughed up blood once | "
        "3# slowly more breathless on the flat | 12# pleuritic pain left side",
        "12# CTPA filling defect | 3# fine inspiratory crackles | 3# clubbing | 3# DLCO {34-58}% | "
        "12# right heart strain on echo | desaturates to {82-88}% on walk test",
        "1# apixaban 10 mg twice daily for 7 days | 12# rivaroxaban 15 mg twice daily | "
        "2# edoxaban 60 mg once daily | 3# nintedanib 150 mg twice daily | 1# dalteparin 15000 units | "
        "3# morphine 2.5 mg as needed",
        "12# anticoagulate {3-6} months | 3# ILD meeting | 3# high resolution CT | "
        "walk test in {3-6} months | 12# thrombophilia screen",
        (32, 84),
    ),
)

GASTROENTEROLOGY = (
    Condition(
        "reflux oesophagitis | GORD, partial response to PPI | functional dyspepsia",
        "burning behind the breastbone after meals | sour taste lying flat | chest discomfort at night | "
        "bloating and early fullness | trouble swallowing bread for {2-8} weeks | "
        "chronic cough and throat clearing",
        "epigastric tenderness | abdomen soft | grade {1-3} oesophagitis at OGD | "
        "H pylori stool antigen negative | no masses | small hiatus hernia",
        "omeprazole {20-40:20} mg once daily | lansoprazole 30 mg once daily | famotidine 20 mg at night | "
        "alginate after meals | domperidone 10 mg as needed",
        "OGD within 2 weeks | raise head of bed | trial off NSAIDs | manometry and pH study | "
        "stop PPI 2 weeks before test",
        (24, 80),
    ),
    Condition(
        "ulcerative colitis flare | Crohn's disease, ileal | IBD unclassified, active",
        "bloody diarrhoea {5-12} times a day | cramps before opening bowels | urgency and accidents | "
        "weight down {3-9} kg | mouth ulcers and sore joints | up at night to the toilet",
        "calprotectin {340-1900} ug/g | left sided tenderness | <crp> | <hb_low> | "
        "13# left sided colitis at colonoscopy | 2# terminal ileum thickened on MRI",
        "mesalazine 2.4 g once daily | prednisolone 40 mg reducing | "
        "azathioprine {100-175:25} mg once daily | infliximab 5 mg/kg | vedolizumab 300 mg | "
        "budesonide 9 mg in the morning",
        "stool cultures and C diff | flexible sigmoidoscopy | IBD nurse line given | check TPMT | "
        "surveillance colonoscopy in {1-3} years",
        (18, 62),
    ),
    Condition(
        "iron deficiency anaemia, source not found | melaena, haemodynamically stable | coeliac disease, new",
        "tired and pale for {2-6} months | 2# black stools for {2-5} days | breathless on exertion | "
        "3# loose stools after bread | 1# craving ice | dizzy on standing",
        "<hb_low> | <ferritin_low> | conjunctival pallor | 3# tTG-IgA {38-160} U/mL | 13# PR brown stool | "
        "2# ulcer in duodenal cap",
        "ferrous sulfate 200 mg once daily | 2# pantoprazole 40 mg twice daily | ferric carboxymaltose 1 g | "
        "2# H pylori eradication for {7-14:7} days | folic acid 5 mg once daily",
        "1# OGD and colonoscopy | 3# gluten free diet, dietitian | 12# stop aspirin and NSAIDs | "
        "1# capsule if both scopes clear | full blood count in {2-4} weeks",
        (22, 85),
    ),
    Condition(
        "decompensated alcohol related cirrhosis | MASLD with fibrosis | autoimmune hepatitis",
        "1# tummy swelling over {2-6} weeks | 13# yellow eyes noticed by family | itching worse at night | "
        "1# confused and sleepy | 1# ankles swollen | 23# no symptoms, abnormal liver tests",
        "1# shifting dullness | 13# <bili> | <alb> | 12# spider naevi and palmar erythema | "
        "elastography {9-38} kPa | ALT {62-380} U/L | platelets {62-128}",
        "1# spironolactone 100 mg once daily | 1# lactulose 20 ml three times daily | "
        "1# rifaximin 550 mg twice daily | 1# carvedilol 6.25 mg | 3# prednisolone 30 mg reducing | "
        "3# azathioprine 75 mg once daily | 2# vitamin E 400 units twice daily | "
        "2# atorvastatin 20 mg at night | 1# thiamine 100 mg twice daily",
        "1# ascitic tap | 12# varices screen | six monthly ultrasound and AFP | 1# alcohol team | "
        "1# no more than 5 g salt a day | 23# liver biopsy | 2# weight loss of 7 to 10%",
        (34, 76),
    ),
    Condition(
        "irritable bowel syndrome | biliary colic | mild gallstone pancreatitis",
        "23# right upper quadrant pain after fatty food | 1# alternating loose and hard stools | "
        "3# pain through to the back | 1# bloating eased by opening bowels | 23# vomiting for {1-3} days | "
        "1# worse when stressed",
        "2# Murphy's sign positive | abdomen soft not distended | 3# lipase {420-1900} U/L | "
        "23# stones on ultrasound, CBD {4-9} mm | 1# calprotectin under 50 | 1# coeliac screen negative",
        "1# mebeverine 135 mg before meals | hyoscine 10 mg as needed | 1# peppermint oil capsules | "
        "1# amitriptyline 10 mg at night | paracetamol 1 g as needed | 1# loperamide 2 mg as needed | "
        "23# tramadol 50 mg as needed",
        "1# low FODMAP with dietitian | 23# surgical referral for gallbladder | 23# MRCP | "
        "1# food and symptom diary | 23# low fat diet",
        (20, 68),
    ),
)

NEPHROLOGY = (
    Condition(
        "CKD stage 3b | diabetic kidney disease | CKD G4 A3",
        "no symptoms, referred with falling eGFR | tired and off food | ankle swelling | "
        "itching for {2-6} months | up to pass urine {2-4} times a night | breathless when lying flat",
        "eGFR {16-44} | <acr> | <creat> | small kidneys on ultrasound | "
        "BP {138-172}/{76-96} | PTH {12-38} pmol/L",
        "losartan {50-100:50} mg once daily | dapagliflozin 10 mg once daily | furosemide 40 mg once daily | "
        "alfacalcidol 0.25 mcg | sodium bicarbonate 500 mg three times daily | atorvastatin 20 mg at night",
        "avoid NSAIDs | repeat U&E in {2-8} weeks | low clearance clinic | renal dietitian | "
        "transplant work-up | sick day rules for tablets",
        (44, 86),
    ),
    Condition(
        "acute kidney injury on CKD | AKI stage {1-3}, pre-renal | AKI after NSAIDs",
        "vomiting and poor intake for {2-5} days | passing little urine | dizzy on standing | "
        "muddled since weekend | started ibuprofen for back pain | diarrhoea after trip",
        "<creat> up from baseline | <k_high> | dry, cool peripheries | bladder scan {40-180} ml | "
        "urine dip bland | no hydronephrosis",
        "IV saline 1 L | calcium gluconate 10 ml | hold ramipril and metformin | insulin dextrose | "
        "salbutamol nebuliser",
        "daily U&E | strict fluid balance | stop nephrotoxins | renal tract ultrasound | "
        "dialysis if K stays over 6.5",
        (40, 90),
    ),
    Condition(
        "nephrotic syndrome | IgA nephropathy | lupus nephritis class {3-5}",
        "frothy urine for {2-6} weeks | puffy eyes in the morning | legs swollen to thighs | "
        "2# cola coloured urine after sore throat | weight up {4-9} kg | 3# rash and sore joints",
        "<alb> | protein 4+ on dip | <acr> | 23# red cell casts | 1# <chol> | 3# ANA positive, C3 low",
        "prednisolone {40-60:20} mg once daily | 3# mycophenolate 1 g twice daily | "
        "ramipril 5 mg once daily | furosemide 80 mg twice daily | 1# tacrolimus 2 mg twice daily | "
        "co-trimoxazole 480 mg",
        "renal biopsy | salt restriction | urine protein each visit | bone protection with steroids | "
        "thrombosis risk discussed",
        (18, 68),
    ),
    Condition(
        "haemodialysis, routine review | peritoneal dialysis, cloudy bag | fluid overload between sessions",
        "1# cramps in the last hour | 2# cloudy bag this morning | 2# belly pain since last night | "
        "13# gained {3-5} kg between sessions | 13# needling pain in fistula | "
        "3# breathless before session | restless legs at night",
        "dry weight {58-94} kg | 1# Kt/V {11-16/10} | phosphate {18-27/10} mmol/L | "
        "13# good thrill over fistula | 2# effluent WCC {240-2100} | <hb_low>",
        "darbepoetin {30-60:10} mcg weekly | sevelamer 800 mg with meals | 2# intraperitoneal vancomycin | "
        "cinacalcet 30 mg | IV iron monthly",
        "lower target weight by {5-15/10} kg | 13# fistula scan | diet sheet for phosphate | "
        "transplant list | 2# swab exit site",
        (32, 82),
    ),
    Condition(
        "renal transplant, year {1-14} | recurrent kidney stones | polycystic kidney disease",
        "2# loin pain radiating to groin | 2# passed gravel | 1# well, no fevers | "
        "1# ankles puffy, graft not sore | 23# blood in urine on and off | 1# tremor since dose change | "
        "3# dragging feeling both flanks",
        "1# tacrolimus level {4-13} | 1# graft non tender | 2# {4-9} mm stone lower pole | "
        "3# cysts both kidneys, {15-22} cm | <creat_ok> | 23# microscopic haematuria",
        "1# tacrolimus {2-5} mg twice daily | 1# mycophenolate 500 mg twice daily | 2# tamsulosin 400 mcg | "
        "3# tolvaptan 45/15 mg | 1# prednisolone 5 mg once daily | 2# potassium citrate 10 mmol | "
        "3# ramipril 5 mg once daily",
        "drink {2-3} L a day | 1# BK and CMV PCR | 2# CT KUB | 1# skin check yearly | 2# stone analysis | "
        "3# family screening",
        (24, 72),
    ),
)

ENDOCRINOLOGY = (
    Condition(
        "type 2 diabetes, above target | T2DM with weight gain | type 2 diabetes on basal insulin",
        "thirsty and passing a lot of urine | tired after meals | numb toes | "
        "sugars {12-19} before breakfast | weight up {3-8} kg | two hypos at night",
        "<a1c> | <glucose> | BMI {29-42} | monofilament {6-9}/10 | <acr_low> | background retinopathy",
        "metformin {500-1000:500} mg twice daily | empagliflozin 10 mg once daily | "
        "semaglutide {25-100:25/100} mg weekly | insulin glargine {14-46:2} units at night | "
        "gliclazide {40-80:40} mg twice daily | sitagliptin 100 mg",
        "foot screen | retinal screening | dietitian and structured course | HbA1c in 3 months | "
        "titrate by 2 units every 3 days",
        (32, 82),
    ),
    Condition(
        "type 1 diabetes, hypo unaware | type 1 diabetes | DKA, resolved",
        "vomiting and belly pain for {1-2} days | no warning of lows | {2-6} hypos a week | "
        "pump alarms at night | ran out of insulin | high after evening meal",
        "ketones {32-61/10} | <glucose> | time in range {38-66}% | lumps at injection sites | "
        "pH {71-73/10} on arrival | <a1c>",
        "insulin aspart with meals 1:{8-14} | insulin degludec {12-32:2} units | glucagon kit | "
        "ramipril 2.5 mg | fixed rate insulin 0.1 units/kg/h",
        "sensor data reviewed | rotate sites | sick day rules and ketone strips | hybrid loop referral | "
        "carb counting refresher",
        (17, 60),
    ),
    Condition(
        "Graves' disease | hypothyroidism | multinodular goitre",
        "1# losing weight despite eating | 1# heart racing and shaky | 2# always cold and tired | "
        "3# neck fullness for {3-9} months | 3# collar feels tight, swallowing fine | 1# gritty eyes | "
        "2# hair thinning and dry skin | 1# loose motions",
        "1# TSH <0.01, free T4 {32-68} | 2# <tsh_high> | 1# smooth goitre with bruit | 1# fine tremor | "
        "1# pulse {98-126} | 1# lid lag | 2# slow relaxing reflexes | "
        "3# nodular thyroid moves on swallowing | 3# <tsh_ok>",
        "1# carbimazole {10-40:10} mg once daily | 1# propranolol 40 mg three times daily | "
        "2# levothyroxine {25-125:25} mcg once daily | 2# ferrous sulfate 200 mg once daily | "
        "1# selenium 100 mcg | 3# no thyroid medication | 3# iodised salt only",
        "1# TRAb and thyroid scan | 12# TSH in {6-8} weeks | 1# sore throat warning, stop and ring | "
        "13# radioiodine discussed | 3# fine needle if nodule over 1 cm | 2# take tablet on empty stomach",
        (22, 74),
    ),
    Condition(
        "adrenal insufficiency | Cushing's, under work-up | pituitary microadenoma",
        "1# dizzy on standing and salt craving | 1# skin darker | 2# round face and easy bruising | "
        "3# low libido and tired | 2# trouble rising from chair | 3# headaches with blurred edges",
        "1# 9 am cortisol {38-110} nmol/L | 1# <na_low> | 1# postural drop {20-34} mmHg | 2# purple striae | "
        "3# prolactin {1400-5200} mU/L | 3# {4-9} mm lesion on pituitary MRI | 2# BP {152-176}/{90-104}",
        "1# hydrocortisone 10/5/5 mg | 1# fludrocortisone 100 mcg once daily | "
        "3# cabergoline 0.5 mg weekly | 3# bromocriptine 2.5 mg at night | "
        "2# metyrapone 250 mg three times daily | 2# alendronic acid 70 mg weekly",
        "1# short synacthen test | 1# steroid card and sick day rules | 2# overnight dexamethasone test | "
        "3# visual fields | 1# emergency hydrocortisone kit | 2# late night salivary cortisol | "
        "3# prolactin in {2-4} months",
        (24, 72),
    ),
    Condition(
        "primary hyperparathyroidism | osteoporosis | vitamin D deficiency",
        "aches in hips and back | 1# constipated and thirsty | 2# wrist fracture after a trip | "
        "13# low mood and tired | 2# height loss of {2-5} cm | 1# kidney stone last year",
        "1# <calcium_high> | 1# PTH {9-28} pmol/L | 2# T score -{26-39/10} spine | "
        "3# vitamin D {11-24} nmol/L | 2# tender thoracic spine | 3# ALP {140-310}",
        "2# alendronic acid 70 mg weekly | 23# colecalciferol {800-3200:800} units once daily | "
        "3# ergocalciferol 50000 units weekly | 1# cinacalcet 30 mg twice daily | 1# indapamide stopped | "
        "2# zoledronate 5 mg yearly | 2# denosumab 60 mg",
        "1# sestamibi scan | 2# DXA in {2-3} years | 2# dental check before treatment | "
        "2# fracture liaison | 3# safe sun and diet | 13# repeat calcium in {4-12} weeks",
        (42, 86),
    ),
)
