"""What an MR series shows, told by its headers: its weighting, how well it serves, whether the kit has a use for it.

Measured attributes decide (repetition, echo and inversion times, the kind of sequence); the words of whoever named the
protocol decide where those are missing or say nothing clear, and tell what no number does: the part of the body.

May use: nothing of the kit.
"""

import math
import re
import unicodedata
from dataclasses import dataclass, field

import numpy as np

PLANES = ("sagittal", "coronal", "axial")  # by the patient axis that the slices' normal is closest to

# Times of lumbar protocols between 0.2 and 3 tesla, with room on either side.
LONGEST_T1_TR_MS = 1300.0  # spin echo; longer ones are proton density, T2, or T1 after an inversion
LONGEST_T1_TE_MS = 35.0
SHORTEST_T2_TR_MS = 1200.0  # 3D turbo spin echo; 2D has 2,500 and more
SHORTEST_T2_TE_MS = 60.0
STIR_TI_MS = (70.0, 280.0)  # fat's null: about 85 ms at 0.3 T, 150 at 1.5 T, 220 at 3 T
T1_TI_MS = (350.0, 1400.0)  # T1 FLAIR
FLUID_TI_MS = 1500.0  # from here on fluid is suppressed: no T2 as the readers had it
LOCALISER_SLICES = 60  # a series in three planes with fewer is a localiser
LONGEST_TE_MS = 350.0  # beyond it only fluid is left: myelography


@dataclass(frozen=True)
class SeriesHeader:
    """What the headers of one series say. NaN, "" and empty sets where they say nothing.

    planes: of its slices, by PLANES, most frequent first; words: series description, protocol and sequence as they
    stand; sequence: words of ScanningSequence; options: of ScanOptions; image_type: of ImageType and FrameType;
    contrast_agent: whether one is named; b_value: of diffusion, the largest; corners_lps_mm: (n, 3) first pixels of
    the slices; spacing_mm: of pixels, the larger.
    """

    modality: str = "MR"
    planes: tuple[str, ...] = ()
    words: str = ""
    body_part: str = ""
    tr_ms: float = math.nan
    te_ms: float = math.nan
    ti_ms: float = math.nan
    flip_deg: float = math.nan
    b_value: float = math.nan
    sequence: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    image_type: frozenset[str] = frozenset()
    contrast_agent: bool = False
    slices: int = 0
    number: int = 0
    spacing_mm: float = math.nan
    thickness_mm: float = math.nan
    corners_lps_mm: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)), compare=False)


@dataclass(frozen=True)
class SeriesKind:
    """What a series is taken for.

    description: one of DESCRIPTIONS, "" where the kit has no use for it; weighting: T1, T2, STIR, T2*, PD or "";
    penalty: how much worse it serves than a plain series of its kind, 0 for that; reason: why it is left out, or what
    is less than plain about it.
    """

    description: str
    weighting: str
    penalty: float
    reason: str


# What protocols are called, in the languages and by the vendors that were met. Text comes without accents, in small
# letters, with one blank for everything that is neither letter nor digit.
_LOCALISER = (
    r"\b(loc|locali[sz]\w*|lokali[sz]\w*|scouts?|surveys?|plan ?scan|pilot|topogram\w*|tomogram loc|smart ?brain|"
    r"3 ?pl(ane)?( loc\w*)?|reperage\w*|ubersicht\w*|localizador\w*|zentrier\w*|posdisp|calibration|calib|"
    r"ref(erence)? ?scan|asset ?cal\w*|coil ?sens\w*|sense ?ref\w*|prescan\w*|shim\w*|"
    r"aahead\w*|aaspine\w*|autoalign\w*)\b"
    r"|локалайзер|定位|位置決め"
)
_MYELOGRAPHY = r"myelo|мрмг|\bmrm\b|脊髓造影"
_DIFFUSION = r"\b(dwi|dti|diff\w*|adc|b ?[1-9]\d{2,3}|trace\w*|ivim|resolve)\b"
_OTHER_IMAGE = (
    r"\b(mip|sub(traction|trahiert)?|screen ?sav\w*|key ?images?|dose|report|spectro\w*|csi|svs|dynamic|dyn|perf\w*|"
    r"dce|angio\w*|mra|tof|phase ?map|b0 ?map|field ?map|t[12] ?map\w*|color|colour|fused|csf flow|pc flow)\b"
)
_T1 = r"(?<![\da-z])(?:\w{0,4}?[a-su-z_])?t1(?!\d)"
_T2 = r"(?<![\da-z])(?:\w{0,4}?[a-su-z_])?t2(?!\d)"
_STIR = r"stir(?!ling)|\btirm\b|short tau"
_T2_STAR = r"t2 ?star|t2s\b|\b(medic|merge|mffe|m ffe|gre|haemo|hemo|swi|swan|me2d\w*)\b"
_STEADY_STATE = r"\b(ciss|fiesta\w*|tru ?fi\w*|trufisp|balanced|b ?ffe|btfe|ssfp|dess|space ?ciss)\b"
_T1_GRADIENT = r"\b(vibe|flash|spgr|fspgr|lava\w*|thrive|thrieve|mprage|e ?thrive|quick ?3d)\b"
_FAT_SATURATED = r"\b(fs|fat ?sat\w*|fatsat|spir|spair|water|wasser|dixon ?w|w dixon|chemsat|fatsup\w*|ideal ?w\w*)\b"
_AGENT = (
    r"\b(gd|gado\w*|post(?!erior)\w*|km|k m|contrast\w*|kontrast\w*|contraste|dotarem|magnevist|inj\w*|ce|apres)\b"
    r"|\+ ?c\b|\bc ?\+"
)
_LUMBAR = (
    r"lumb\w*|lomb\w*|\b(l ?s|lsp\w*|l ?spine|lws|lwk|lss|ls ?spine|sacr\w*|tls|bws lws|поясн\w*)\b"
    r"|поясн|腰|lend[wv]|ledzw"
)
# Words of ImageType for what is no magnitude image of all tissues.
_OTHER_KINDS = frozenset("F FAT OP OPP_PHASE OUT_PHASE P PHASE R REAL I IMAGINARY".split()) | {"PHASE MAP", "OUT PHASE"}
_ELSEWHERE = {
    "cervical": r"cerv\w*|zervik|szyj|\b(c ?spine|hws|hwk|csp\w*|neck|hals\w*|шейн\w*)\b|шейн|颈|頸",
    "thoracic": r"thora\w*|torac|piersiow|\b(t ?spine|bws|bwk|dorsal\w*|tsp\w*|грудн\w*)\b|грудн|胸",
    "a head": r"\b(head|brain|skull|kopf|schadel|schaedel|cerebr\w*|cran\w*|encephal\w*)\b|головн",
    "a hip": r"\b(hips?|hufte|huefte|hanche|femur)\b",
    "sacroiliac joints": r"\b(si ?joints?|isg|sij|sacro ?iliac\w*|iliosacral\w*)\b",
}


def plain_words(text: str) -> str:
    """Text as protocols' names are compared: small letters without accents, blanks for all that is no letter or digit.

    >>> plain_words("T2-TSE_sag (Wirbelsäule)")
    't2 tse sag wirbelsaule'
    """
    letters = unicodedata.normalize("NFKD", text.replace("ß", "ss")).lower()
    letters = "".join(c for c in letters if not unicodedata.combining(c))
    letters = re.sub(r"т(?=[12])", "t", letters)  # Cyrillic, which looks the same
    letters = re.sub(r"[^\w+*]|_", " ", letters)
    return " ".join(re.sub(r"t2 ?\*", "t2star ", letters).split())


def plane_of(row_lps: np.ndarray, column_lps: np.ndarray) -> str:
    """The plane of a slice from its two directions, each (3,): by the patient axis nearest to its normal."""
    return PLANES[int(np.argmax(np.abs(np.cross(row_lps, column_lps))))]


def _has(pattern: str, words: str) -> bool:
    return re.search(pattern, words) is not None


def weighting_of(header: SeriesHeader) -> tuple[str, str]:
    """(weighting, doubt): T1, T2, STIR, T2*, PD, or "" where it cannot be told; and a sentence or ""."""
    words = plain_words(header.words)
    measured = _measured_weighting(header, words)
    named = _named_weighting(words)
    if not measured:
        return named, "" if named else "neither its times nor its names tell the weighting"
    if named and not _agree(measured, named):
        # Between T1 and T2 a protocol's name may have been copied; what lies between them the name decides.
        if measured == "PD":
            return named, f"its echo time of {header.te_ms:g} ms is unusual for {named}"
        return measured, f"its name says {named}, its times {measured}"
    return measured, ""


def _agree(measured: str, named: str) -> bool:
    fluid = ("T2", "STIR", "T2*")
    return measured == named or (measured in fluid and named in fluid)


def _named_weighting(words: str) -> str:
    if _has(_STIR, words):
        return "STIR"
    if _has(_T2_STAR, words) or _has(_STEADY_STATE, words):
        return "T2*"
    t1, t2 = _has(_T1, words), _has(_T2, words)
    if t1 != t2:
        return "T1" if t1 else "T2"
    if not t1 and _has(r"\bpd\w{0,2}\b|proton", words):
        return "PD"
    return ""


def _measured_weighting(header: SeriesHeader, words: str) -> str:
    """The weighting by repetition, echo and inversion times and the kind of sequence; "" where they do not tell."""
    tr, te, ti = header.tr_ms, header.te_ms, header.ti_ms
    gradient = "GR" in header.sequence and "SE" not in header.sequence
    if gradient:
        if _has(_T1_GRADIENT, words) or (_has(_T1, words) and not _has(_T2, words)):
            return "T1"
        if _has(_T2_STAR, words) or _has(_STEADY_STATE, words) or te >= 12:
            return "T2*"
        return ""
    inverted = "IR" in header.sequence or ti > 0
    if inverted and STIR_TI_MS[0] <= ti <= STIR_TI_MS[1] and not tr < LONGEST_T1_TR_MS:
        # Some writers state the delay of a fat suppression pulse here: that is no other weighting.
        return "STIR" if "IR" in header.sequence or not te >= SHORTEST_T2_TE_MS else "T2"
    if inverted and T1_TI_MS[0] <= ti <= T1_TI_MS[1] and not te > LONGEST_T1_TE_MS + 15:
        return "T1"
    if te >= SHORTEST_T2_TE_MS:
        return "T2" if not tr < SHORTEST_T2_TR_MS / 2 else ""
    if te > 0 and tr > 0:
        if te <= LONGEST_T1_TE_MS and tr <= LONGEST_T1_TR_MS:
            return "T1"
        if tr > SHORTEST_T2_TR_MS:
            return "PD"
    return ""


def kind_of_series(header: SeriesHeader) -> SeriesKind:
    """What a series is taken for, see SeriesKind.

    Examples
    --------
    >>> kind_of_series(SeriesHeader(planes=("sagittal",), tr_ms=3500, te_ms=100)).description
    'Sagittal T2/STIR'
    >>> kind_of_series(SeriesHeader(planes=("coronal",), tr_ms=600, te_ms=10)).reason
    'coronal'
    """
    words = plain_words(header.words)
    reason = _no_use(header, words)
    weighting, doubt = weighting_of(header)
    if reason:
        return SeriesKind("", weighting, 0.0, reason)
    plane = header.planes[0]
    if weighting == "PD" and plane == "sagittal":
        return SeriesKind("", weighting, 0.0, "proton density, no T1 and no T2")
    description = {
        ("sagittal", "T1"): "Sagittal T1",
        ("sagittal", "T2"): "Sagittal T2/STIR",
        ("sagittal", "STIR"): "Sagittal T2/STIR",
        ("sagittal", "T2*"): "Sagittal T2/STIR",
        ("axial", "T2"): "Axial T2",
        ("axial", "STIR"): "Axial T2",
        ("axial", "T2*"): "Axial T2",
    }.get((plane, weighting), "")
    if not description:
        what = f"{plane} {weighting}" if weighting else doubt
        return SeriesKind("", weighting, 0.0, what)
    lacks = list(_what_it_lacks(header, words, weighting))
    penalty = sum(points for points, _ in lacks) + (0.5 if doubt else 0.0)
    return SeriesKind(
        description, weighting, penalty, "; ".join([*(text for _, text in lacks), *filter(None, [doubt])])
    )


def _no_use(header: SeriesHeader, words: str) -> str:
    """Why the kit has no use for a series, whatever its weighting; "" where it may have."""
    if header.modality not in ("MR", ""):
        return f"modality {header.modality}, not MR"
    if not header.planes:
        return "its headers do not say where it lies in the patient"
    if "LOCALIZER" in header.image_type or _has(_LOCALISER, words) or _in_three_planes(header):
        return "a localiser"
    if header.b_value > 0 or _has(_DIFFUSION, words) or header.image_type & {"ADC", "DIFFUSION", "TRACEW", "FA"}:
        return "diffusion"
    if _has(_MYELOGRAPHY, words) or header.te_ms > LONGEST_TE_MS:
        return "myelography"
    if header.image_type & {"PROJECTION IMAGE", "MIP", "MINIP"}:
        return "a projection, no slices"
    other = header.image_type & _OTHER_KINDS
    if other:
        return f"an image of another kind ({', '.join(sorted(other))})"
    if header.image_type & {"SUBTRACTION", "SUB", "T1 MAP", "T2 MAP"} or _has(_OTHER_IMAGE, words):
        return "a computed or dynamic series"
    if header.ti_ms >= FLUID_TI_MS and header.te_ms >= SHORTEST_T2_TE_MS:
        return "fluid is suppressed (FLAIR)"
    if header.planes[0] == "coronal":
        return "coronal"
    if not _has(_LUMBAR, words) and not _has(_LUMBAR, plain_words(header.body_part)):
        # A body part is often left as it was for the last patient: only the names of the series say another one.
        for name, pattern in _ELSEWHERE.items():
            if _has(pattern, words):
                return f"shows {name}, not the lumbar spine" if name.startswith("a ") else f"{name}, not lumbar"
    return ""


def _in_three_planes(header: SeriesHeader) -> bool:
    return len(header.planes) == 3 and header.slices < LOCALISER_SLICES


def _what_it_lacks(header: SeriesHeader, words: str, weighting: str):
    """(points, words) for what makes a series serve less well than a plain one of its kind."""
    if weighting == "T2*":
        yield 3.0, "gradient echo"
    if weighting == "STIR" and header.planes[0] == "axial":
        yield 2.0, "STIR"
    elif weighting == "STIR":
        yield 1.0, "STIR"
    elif header.options & {"FS", "FAT_SAT", "SFS"} or _has(_FAT_SATURATED, words) or header.image_type & {"W", "WATER"}:
        yield 1.0, "fat suppressed"
    if header.contrast_agent or _has(_AGENT, words):
        yield 2.0, "after a contrast agent"
    if "GR" in header.sequence and "SE" not in header.sequence and weighting == "T1":
        yield 3.0, "gradient echo"
    if header.image_type & {"MPR", "REFORMATTED", "RESAMPLED"} or _has(r"\b(mpr|reformat\w*|recon)\b", words):
        yield 1.5, "reformatted"
    few = 5 if header.planes[0] == "sagittal" else 3
    if header.slices < few:
        yield 3.0, f"{header.slices} slices"
    if header.spacing_mm > 1.6:
        yield 2.0, f"pixels of {header.spacing_mm:.1f} mm"
