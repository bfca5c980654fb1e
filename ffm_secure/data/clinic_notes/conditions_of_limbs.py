"""The vocabulary of `builtin:clinic_notes`, second half: nerves, bones, skin, mind and joints."""

from __future__ import annotations

from ffm_secure.data.clinic_notes.conditions_of_organs import Condition

NEUROLOGY = (
    Condition(
        "migraine with aura | chronic migraine | medication overuse headache",
        "throbbing headache {4-18} days a month | zigzag lights then headache | "
        "light and noise bother the eyes | vomits with the worst ones | taking painkillers most days | "
        "headaches worse with poor sleep",
        "cranial nerves intact | fundi normal | no meningism | neck muscles tight | MRI brain unremarkable | "
        "neurological examination normal",
        "sumatriptan 50 mg as needed | propranolol 40 mg twice daily | topiramate 25 mg at night | "
        "candesartan 8 mg | amitriptyline 10 mg at night | erenumab 140 mg monthly",
        "headache diary | stop codeine | limit triptan to {8-10} days a month | "
        "botulinum toxin if third drug fails | sleep and caffeine advice",
        (18, 58),
    ),
    Condition(
        "focal epilepsy | first seizure | juvenile myoclonic epilepsy",
        "found on floor, bitten tongue | blank spells lasting {1-3} minutes | jerks in the mornings | "
        "rising feeling then lost time | {1-4} fits since last seen | blacked out at work",
        "EEG left temporal sharp waves | postictal, now orientated | no focal weakness | "
        "levels {6-18} mg/L | MRI hippocampal sclerosis | ECG normal QTc",
        "levetiracetam {500-1000:250} mg twice daily | lamotrigine {50-150:25} mg twice daily | "
        "sodium valproate 500 mg | carbamazepine 400 mg twice daily | clobazam 10 mg",
        "no driving, DVLA told | sleep deprived EEG | seizure safety advice | slow titration, rash warning | "
        "rescue midazolam plan",
        (16, 66),
    ),
    Condition(
        "Parkinson's disease, wearing off | idiopathic Parkinson's",
        "shaking of right hand at rest | slower dressing and shuffling | falls {1-4} in last month | "
        "acting out dreams | handwriting smaller | stiff before next dose | low mood and apathy",
        "cogwheel rigidity right arm | bradykinesia on finger taps | reduced arm swing | "
        "postural drop {22-38} mmHg | face less expressive | DAT scan abnormal",
        "co-careldopa 25/100 three times daily | rasagiline 1 mg once daily | ropinirole 4 mg | "
        "rotigotine 4 mg patch | clonazepam 0.5 mg at night",
        "physiotherapy for gait | Parkinson's nurse | move doses closer | lying and standing BP | "
        "speech therapy | watch for impulse control problems",
        (52, 86),
    ),
    Condition(
        "TIA, left carotid territory | lacunar infarct | ischaemic stroke, recovering",
        "weak right arm for {10-50:10} minutes | slurred speech, now settled | face drooped at breakfast | "
        "curtain over left eye | numb hand on waking | unsteady for {1-5} days",
        "NIHSS {0-6} | pronator drift right | carotid stenosis {50-85}% | CT no bleed | "
        "power 4/5 right arm | BP {148-186}/{82-102}",
        "clopidogrel 75 mg once daily | aspirin 300 mg for 2 weeks | atorvastatin 80 mg at night | "
        "apixaban 5 mg twice daily | ramipril 2.5 mg",
        "carotid doppler | 72 h tape for AF | stroke rehab | "
        "no driving for a month | MRI DWI | swallow assessment",
        (54, 90),
    ),
    Condition(
        "relapsing MS | peripheral neuropathy | carpal tunnel syndrome",
        "12# pins and needles in both feet | 3# numb hands at night, shakes them out | 3# drops cups | "
        "1# blurred vision with eye pain for {3-9} days | 1# legs heavy after {10-30:10} minutes | "
        "1# electric feeling on bending neck | 2# burning soles | tired all the time",
        "12# reduced vibration to ankles | 3# Tinel's positive | 1# {2-6} new T2 lesions | "
        "1# brisk reflexes, plantars up | 2# absent ankle jerks | 3# thenar wasting | 2# B12 {98-180} ng/L",
        "1# dimethyl fumarate 240 mg twice daily | 12# gabapentin {100-300:100} mg three times daily | "
        "2# duloxetine 30 mg once daily | 1# methylprednisolone 500 mg for 5 days | "
        "2# pregabalin 75 mg twice daily | 3# steroid injection to wrist | 3# paracetamol 1 g as needed",
        "23# nerve conduction studies | 3# wrist splints at night | 1# MRI with contrast | 1# MS nurse | "
        "2# neuropathy bloods | 1# annual relapse review",
        (22, 72),
    ),
)

ORTHOPAEDICS = (
    Condition(
        "osteoarthritis knee | OA hip | end stage knee OA",
        "13# knee pain on stairs | 2# groin pain after {5-20:5} minutes walking | "
        "stiff for {10-30:10} minutes in the morning | 13# knee gives way | pain wakes at night | "
        "2# cannot put on socks",
        "13# crepitus, flexion to {90-120:5} | 13# medial joint line tenderness | antalgic gait | "
        "loss of joint space on film | 2# internal rotation {0-15:5} degrees | 13# small effusion",
        "paracetamol 1 g four times daily | naproxen 500 mg twice daily | topical ibuprofen | "
        "codeine 30 mg as needed | steroid injection to joint",
        "3# list for knee replacement | 2# list for hip replacement | physiotherapy and weight loss | "
        "13# injection today | walking stick left hand | pre-op assessment",
        (50, 86),
    ),
    Condition(
        "distal radius fracture | ankle fracture, Weber B | clavicle fracture",
        "13# fell on outstretched hand {1-9} days ago | 2# rolled ankle on kerb | 13# came off bike | "
        "12# cast feels tight | pain settling | 1# pins and needles in fingers",
        "1# dorsal tilt {8-22} degrees | swelling and bruising, skin intact | 2# no talar shift | "
        "neurovascularly intact | callus forming at {4-7} weeks | tender over fracture site",
        "co-codamol 30/500 as needed | ibuprofen 400 mg three times daily | paracetamol 1 g | "
        "2# enoxaparin 40 mg once daily",
        "12# cast for {4-6} weeks | film in {1-2} weeks | theatre list for plate | "
        "2# boot and weight bear as able | 3# broad arm sling {2-3} weeks | 1# elevate, finger exercises",
        (17, 82),
    ),
    Condition(
        "lumbar disc prolapse | spinal stenosis | mechanical back pain",
        "1# back pain shooting to left foot | 2# leg pain worse walking, better leaning forward | "
        "13# lifting injury {1-6} weeks ago | 1# numb outer foot | stiff back in the mornings | "
        "cannot sit for more than {10-30:10} minutes",
        "1# straight leg raise {30-60:10} degrees left | 1# reduced ankle jerk | no saddle numbness | "
        "1# L4/5 disc on MRI | 13# paraspinal spasm | power full",
        "naproxen 250 mg three times daily | amitriptyline 10 mg at night | diazepam 2 mg for 3 days | "
        "12# gabapentin 300 mg at night | paracetamol 1 g as needed",
        "physiotherapy | MRI lumbar spine | 1# nerve root block | 12# cauda equina warning given | "
        "stay active | spinal clinic",
        (26, 78),
    ),
    Condition(
        "rotator cuff tear | frozen shoulder | subacromial impingement",
        "shoulder pain reaching overhead | cannot reach behind the back | pain lying on that side | "
        "1# weak lifting a kettle | 2# stiff shoulder for {3-9} months | 1# felt a pop at the gym",
        "13# painful arc {60-120:10} degrees | 2# external rotation {0-20:5} | 1# weak supraspinatus | "
        "1# full thickness tear on ultrasound | 3# Hawkins positive | no wasting",
        "steroid injection subacromial | ibuprofen 400 mg three times daily | codeine 15 mg as needed | "
        "topical diclofenac",
        "physiotherapy programme | 1# arthroscopic repair | 2# hydrodilatation | ultrasound shoulder | "
        "sling for comfort",
        (34, 76),
    ),
    Condition(
        "hip fracture, day {2-6} post op | meniscal tear | ACL rupture",
        "23# twisted knee at football, heard a pop | 2# locks when bending | "
        "1# hip pain after fall at home | 23# swelled up within {1-4} hours | slept badly with pain | "
        "3# knee unstable on turning",
        "1# wound dry, clips in | 3# Lachman positive | 3# pivot shift positive | 2# McMurray positive | "
        "23# moderate effusion | 2# joint line tender | 1# <hb_low> | 1# mobilised {5-30:5} m with frame",
        "1# enoxaparin 40 mg once daily | 1# oxycodone 5 mg as needed | paracetamol 1 g four times daily | "
        "1# zoledronate 5 mg | 1# lactulose 15 ml twice daily | 23# ibuprofen 400 mg three times daily",
        "1# mobilise full weight | 23# MRI knee | 3# reconstruction list | 2# arthroscopy list | "
        "1# clips out day {10-14} | 1# falls and bone health review",
        (18, 90),
    ),
)

DERMATOLOGY = (
    Condition(
        "chronic plaque psoriasis | psoriasis, PASI {6-18} | guttate psoriasis",
        "scaly patches on elbows and knees | itchy scalp | sore joints with the rash | "
        "flared after sore throat | nails pitting | embarrassed by skin, low mood",
        "silvery plaques extensor surfaces | BSA {3-18}% | nail pitting | DLQI {8-22} | "
        "scalp scale past hairline | no joint swelling",
        "calcipotriol/betamethasone once daily | methotrexate {10-20:5} mg weekly | "
        "adalimumab 40 mg fortnightly | coal tar shampoo | folic acid 5 mg weekly",
        "narrowband UVB {18-30:2} sessions | bloods before systemic | TB and hepatitis screen | "
        "emollient plan | screen for joint disease",
        (18, 70),
    ),
    Condition(
        "atopic eczema | infected eczema | hand dermatitis, irritant",
        "itch keeps awake at night | cracked hands since new soap at work | weeping patches for {2-7} days | "
        "flares with stress | worse in winter | dry skin since childhood",
        "lichenified flexures | crusting behind knees | fissures on fingertips | EASI {9-28} | "
        "excoriations arms | no vesicles",
        "mometasone once daily for {1-2} weeks | emollient 500 g | flucloxacillin 500 mg four times daily | "
        "tacrolimus ointment twice daily | dupilumab 300 mg fortnightly | cetirizine 10 mg at night",
        "patch testing | soap substitute | wet wraps | step down steroid when clear | "
        "occupational health letter",
        (16, 62),
    ),
    Condition(
        "basal cell carcinoma | suspected melanoma | actinic keratoses",
        "2# mole darker and bigger over {2-8} months | 1# spot on nose that bleeds | "
        "3# rough patches on scalp | 1# non healing sore for {3-12} months | 2# itchy mole on back | "
        "sunburnt often as a child",
        "1# pearly {4-12} mm papule with telangiectasia | 2# asymmetrical pigmented lesion {6-14} mm | "
        "3# gritty scale on scalp | no nodes | 2# atypical network on dermoscopy | type {1-2} skin",
        "13# fluorouracil cream twice daily for {3-4} weeks | 13# imiquimod 5 nights a week | "
        "3# cryotherapy today | sunscreen SPF 50 | 2# petroleum jelly to wound | "
        "2# paracetamol 1 g as needed",
        "2# excision 2 week wait | 1# shave biopsy | 1# Mohs referral | photographs taken | "
        "skin checks every {3-6} months | sun advice",
        (38, 88),
    ),
    Condition(
        "acne vulgaris, moderate | rosacea | hidradenitis, Hurley {1-3}",
        "3# painful lumps in armpits | 1# spots on face and back for {1-4} years | 2# flushing with wine | "
        "13# scarring worries | low mood about skin | 2# gritty eyes",
        "1# comedones and pustules cheeks | 1# ice pick scars | 2# central erythema and papules | "
        "3# draining sinus left axilla | 3# tender nodules both groins | 3# bridged scars | 12# no nodules | "
        "2# mild blepharitis",
        "13# lymecycline 408 mg once daily | 1# adapalene/benzoyl peroxide at night | "
        "1# isotretinoin {20-40:10} mg once daily | 2# ivermectin cream once daily | "
        "2# doxycycline 40 mg once daily | 3# clindamycin lotion",
        "1# LFTs and lipids before start | 1# isotretinoin consent signed | review in {8-12} weeks | "
        "3# stop smoking | mood check each visit",
        (16, 52),
    ),
    Condition(
        "chronic urticaria | drug eruption | leg cellulitis | venous leg ulcer",
        "1# itchy wheals most days for {6-20} weeks | 2# rash {5-10} days after antibiotic | "
        "2# itchy all over since new tablet | 2# spots spread from chest to arms | "
        "3# red hot leg and fever | 3# shin sore and tight for {2-5} days | "
        "3# shivers overnight, leg pink | 4# leg ulcer weeping | 1# lips swelled twice | "
        "4# ankle swelling and brown skin",
        "1# blanching wheals trunk | 1# dermographism | 1# UAS7 {16-38} | "
        "2# maculopapular rash, no mucosal signs | 3# demarcated erythema to mid shin | "
        "3# warm, tender calf skin | 3# <crp> | 4# {2-7} cm ulcer over medial malleolus | "
        "4# ABPI {8-11/10} | 2# eosinophils {6-18/10}",
        "12# cetirizine 10 mg twice daily | 1# omalizumab 300 mg monthly | "
        "3# flucloxacillin 1 g four times daily | 3# paracetamol 1 g as needed | "
        "12# prednisolone 30 mg for {3-5} days | 12# chlorphenamine 4 mg at night | "
        "4# emollient to surrounding skin | 4# potassium permanganate soaks",
        "2# stop culprit drug, allergy alert | 4# compression bandage | photograph rash | "
        "3# mark edge of redness | 124# biopsy if not settling",
        (22, 84),
    ),
)

PSYCHIATRY = (
    Condition(
        "moderate depressive episode | recurrent depression | depression with anxiety",
        "low mood for {2-9} months | waking at 4 am | no interest in anything | cannot concentrate at work | "
        "off food, weight down {3-7} kg | tired all the time | fleeting thoughts of not being here",
        "PHQ-9 {12-24} | reduced eye contact, speech slow | no psychotic features | denies active plans | "
        "affect flat | <tsh_ok>",
        "sertraline {50-150:50} mg once daily | mirtazapine {15-30:15} mg at night | venlafaxine 75 mg | "
        "citalopram 20 mg once daily | fluoxetine 20 mg once daily",
        "CBT referral | crisis plan shared | sick note {2-4} weeks | review mood in {1-3} weeks | "
        "behavioural activation | check sleep and alcohol",
        (18, 76),
    ),
    Condition(
        "generalised anxiety | panic disorder | health anxiety",
        "heart racing and tight chest, tests clear | cannot switch off worry | tingling hands when anxious | "
        "avoids buses and shops | poor sleep for {2-8} months | stomach churning before work",
        "GAD-7 {11-20} | fidgety, well kempt | insight good | ECG normal | no thought disorder | "
        "hands cold, pulse {88-108}",
        "escitalopram {5-15:5} mg once daily | propranolol 10 mg as needed | pregabalin 75 mg twice daily | "
        "sertraline 50 mg | buspirone 5 mg",
        "guided self help | psychology waiting list | breathing exercises | cut caffeine | "
        "avoid benzodiazepines",
        (18, 66),
    ),
    Condition(
        "bipolar disorder, hypomanic | bipolar, euthymic on lithium | bipolar depression",
        "1# sleeping {2-4} hours, full of ideas | 1# overspending this month | "
        "2# shaky hands and thirsty | 2# steady since last visit | 3# low and slowed for {3-8} weeks | "
        "13# stopped tablets {2-6} weeks ago | 1# talking fast, family worried",
        "1# pressured speech | 2# lithium {4-11/10} mmol/L | 1# grandiose, not deluded | 1# YMRS {9-26} | "
        "2# fine tremor | 3# PHQ-9 {14-22} | 3# slow to answer, flat | <creat_ok>",
        "2# lithium {400-1000:200} mg at night | quetiapine {50-300:50} mg at night | "
        "1# olanzapine 10 mg at night | lamotrigine 100 mg twice daily | valproate 500 mg twice daily",
        "2# lithium, U&E and TSH in {1-12} weeks | 13# home treatment team | sleep routine | "
        "relapse signs reviewed | 1# no driving while high",
        (20, 70),
    ),
    Condition(
        "schizophrenia, stable on depot | first episode psychosis | clozapine clinic",
        "hears voices commenting | feels neighbours listen in | 3# sleepy and drooling at night | "
        "weight up {5-14} kg | 1# missed depot by {1-3} weeks | not leaving the house",
        "guarded, responding to unseen stimuli | 3# neutrophils {21-58/10} | no extrapyramidal signs | "
        "BMI {27-38} | QTc {402-456} | delusional but not distressed",
        "3# clozapine {150-400:50} mg at night | 3# hyoscine 300 mcg at night | "
        "1# paliperidone 100 mg monthly | 12# aripiprazole {10-20:5} mg once daily | "
        "2# risperidone 2 mg at night | 12# procyclidine 5 mg as needed",
        "3# weekly bloods | metabolic screen | 2# early intervention team | "
        "1# depot given today | carer assessment",
        (18, 68),
    ),
    Condition(
        "alcohol dependence | opioid use disorder, stable | insomnia with low mood",
        "1# drinking {6-14} units a day | 1# shakes in the mornings | 1# fell twice this week | "
        "12# wants to cut down | 2# using on top at weekends | 3# awake until {2-4} am | "
        "3# naps in the day | 13# memory poor",
        "1# AUDIT {18-34} | 1# CIWA {6-19} | 1# tremor and sweating | 2# not withdrawing | "
        "2# pupils normal, no fresh marks | 1# GGT {140-620} | 13# MoCA {20-26} | 3# PHQ-9 {8-15}",
        "1# chlordiazepoxide 20 mg four times daily reducing | 1# thiamine 100 mg three times daily | "
        "1# acamprosate 666 mg | 2# methadone {30-70:10} ml once daily | 2# buprenorphine 8 mg once daily | "
        "3# melatonin 2 mg at night | 3# mirtazapine 15 mg at night",
        "1# detox bed | 2# supervised collection | 2# naloxone kit | 3# sleep diary | 3# CBT for insomnia | "
        "3# no screens after ten | 12# mutual aid group | 12# liver tests",
        (22, 68),
    ),
)

RHEUMATOLOGY = (
    Condition(
        "rheumatoid arthritis, DAS28 {28-58/10} | early inflammatory arthritis | seropositive RA",
        "stiff hands for {45-120:15} minutes each morning | swollen knuckles for {6-14} weeks | "
        "cannot make a fist | tired all the time | wrist pain at night | flare after stopping tablets",
        "{4-14} tender, {2-9} swollen joints | anti-CCP {60-340} | boggy MCPs both hands | <crp> | "
        "erosions on foot films | ESR {28-82}",
        "methotrexate {10-25:5} mg weekly | folic acid 5 mg weekly | hydroxychloroquine 200 mg twice daily | "
        "sulfasalazine 1 g twice daily | prednisolone {5-15:5} mg once daily | etanercept 50 mg weekly",
        "monitoring bloods every {2-12:2} weeks | biologic pathway | hand therapy | "
        "chest film before methotrexate | ultrasound hands",
        (26, 80),
    ),
    Condition(
        "gout flare | tophaceous gout | pseudogout",
        "12# hot swollen big toe overnight | knee blew up after water tablet | {2-6} attacks this year | "
        "cannot bear the bedsheet | ankle pain for {2-5} days | 2# lumps on elbows",
        "12# <urate> | 12# first MTP red and tender | 1# negative birefringent crystals | "
        "knee effusion, warm | <crp> | 2# tophi both ears | 3# chondrocalcinosis on film | "
        "3# positive birefringent rhomboids",
        "12# allopurinol {100-300:100} mg once daily | colchicine 500 mcg twice daily | "
        "naproxen 500 mg twice daily | prednisolone 30 mg for 5 days | 2# febuxostat 80 mg once daily",
        "12# urate target under 300 | aspirate joint | 12# change bendroflumethiazide | "
        "12# diet and beer advice | kidney function",
        (38, 86),
    ),
    Condition(
        "SLE, mild flare | Sjogren's | undifferentiated connective tissue disease",
        "rash over cheeks in sun | mouth ulcers | dry gritty eyes | fingers go white in the cold | "
        "aching all over, worn out | chest pain on deep breath",
        "ANA 1:{640-1280:640} | dsDNA {48-190} | C4 low | Schirmer {2-4} mm | urine protein trace | "
        "malar erythema | platelets {88-140}",
        "hydroxychloroquine 200 mg twice daily | mycophenolate 500 mg twice daily | azathioprine 100 mg | "
        "nifedipine 10 mg three times daily | prednisolone 10 mg reducing | artificial tears",
        "eye screening | sunscreen | urine each visit | echo and lung function | vaccines up to date",
        (18, 62),
    ),
    Condition(
        "polymyalgia rheumatica | giant cell arteritis, suspected | GCA on steroid taper",
        "1# shoulders and hips stiff for {3-8} weeks | 1# cannot lift arms to comb hair | "
        "23# new temple headache | 23# jaw aches chewing | lost {2-6} kg, night sweats | "
        "2# vision dimmed for minutes",
        "ESR {54-104} | <crp> | 23# tender thickened temporal artery | 1# power normal, movement painful | "
        "2# halo sign on ultrasound | <hb_low>",
        "1# prednisolone 15 mg once daily | 2# prednisolone {40-60:20} mg once daily | "
        "3# prednisolone {8-30} mg once daily | omeprazole 20 mg once daily | alendronic acid 70 mg weekly | "
        "3# tocilizumab 162 mg weekly | calcium and vitamin D",
        "2# temporal artery ultrasound within {1-3} days | 13# taper by 1 mg a month | steroid card | DXA | "
        "23# eye casualty if vision changes",
        (56, 88),
    ),
    Condition(
        "axial spondyloarthritis | psoriatic arthritis | fibromyalgia",
        "1# back stiff at night, better moving | 12# heel pain for {3-9} months | 2# sausage toe | "
        "3# pain everywhere, sleeps badly | 1# buttock pain alternating | 3# poor concentration and tired",
        "1# Schober {2-4} cm | 1# sacroiliitis on MRI | 3# {11-18} tender points | 2# dactylitis left foot | "
        "1# HLA-B27 positive | 2# nail changes, skin plaques | 13# CRP under 5",
        "12# adalimumab 40 mg fortnightly | 12# etoricoxib {60-90:30} mg once daily | "
        "3# duloxetine {30-60:30} mg once daily | 3# amitriptyline 10 mg at night | "
        "2# methotrexate 15 mg weekly | 12# secukinumab 150 mg monthly",
        "hydrotherapy | 1# BASDAI each visit | 3# pain management course | 3# graded exercise | "
        "2# joint skin clinic | stop smoking",
        (20, 64),
    ),
)
