"""How much of a caption is boilerplate: "photographed on <date>" and its like (Appendix C), in the forms dates take.

The paper does not list its phrases; these are ours.
"""

import re

MONTHS = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?"
)
DAYS = r"(?:mon|tue(?:s)?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?"
DAY, YEAR = r"\d{1,2}(?:st|nd|rd|th)?", r"(?:1[89]\d\d|20\d\d)"
# Name -> a form of date; a test holds one example of each.
DATES = {
    "2014-03-05": rf"{YEAR}[-/.:]\d{{1,2}}[-/.:]\d{{1,2}}",
    "05/03/2014": rf"\d{{1,2}}[-/.]\d{{1,2}}[-/.](?:{YEAR}|\d\d)",
    "5 March 2014": rf"{DAY}(?:\s+of)?[\s-]+{MONTHS},?[\s-]+{YEAR}",
    "March 5th, 2014": rf"{MONTHS}\s+{DAY},?\s+{YEAR}",
    "2014 March 5": rf"{YEAR}\s+{MONTHS}\s+{DAY}",
    "March 2014": rf"{MONTHS},?\s+{YEAR}",
    "5 March": rf"{DAY}(?:\s+of)?\s+{MONTHS}",
    "March 5th": rf"{MONTHS}\s+{DAY}",
    "20140305": r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])",
    "2014": YEAR,
}
TIME = r"\d{1,2}:\d\d(?::\d\d)?(?:\s*[ap]\.?m\.?)?"
DATE = rf"(?:{DAYS},?\s+)?(?:the\s+)?(?:{'|'.join(DATES.values())})(?:,?\s+(?:at\s+)?{TIME})?"
MADE = (
    r"(?:photograph(?:ed|s)?|photos?|pictures?|images?|pics?|snapshots?|taken|shot|captured|uploaded|posted|published"
    r"|added|updated|created|filed|dated|recorded|released|seen)"
)
# Name -> what counts as boilerplate wherever it stands.
BOILERPLATE = {
    # "photographed on <date>", "photo taken in <date>", "this picture was uploaded at <date>".
    "made on a date": rf"\b(?:this\s+)?(?:{MADE}:?\s+){{1,3}}(?:was\s+{MADE}\s+)?(?:on|in|at|from|by)?:?\s*{DATE}",
    "a date": rf"(?<![\w.,-]){DATE}(?![\w-])",
    "a camera's file name": r"\b(?:img|dsc[fn]?|dscn|p\d{3}|pict|mvc|image|photo|picture)[ _-]?\d{2,}(?:\.\w{3,4})?\b",
    "a file name": r"\b[\w-]+\.(?:jpe?g|png|gif|bmp|tiff?|webp)\b",
    "a count": r"\b(?:image|photo|picture|slide|page|figure)\s+\d+(?:\s+(?:of|/)\s+\d+)?",
    "an instruction": r"\b(?:click|tap)\s+(?:here\s+)?(?:to|on|for)\s+(?:the\s+)?(?:image\s+to\s+)?"
    r"(?:enlarge|view|see|zoom|open)?(?:\s+(?:the\s+)?(?:larger|full[- ]size|bigger)?\s*(?:image|picture|version))?",
    "rights": r"\ball\s+rights\s+reserved\b|(?:©|\(c\)|\bcopyright\b)\s*(?:\(c\)|©)?\s*\d{0,4}",
    "stock": r"\b(?:royalty[- ]free\s+)?stock\s+(?:photo(?:graph)?s?|images?|pictures?|vectors?|illustrations?)\b",
    "nothing said": r"\b(?:no\s+(?:description|caption|title)(?:\s+(?:available|provided|given|yet))?|untitled)\b",
}
# Patterns search in quadratic time at worst: what comes later in a text this long is not looked at.
MAX_CHARACTERS = 2_000
_ANY = re.compile("|".join(f"(?:{pattern})" for pattern in BOILERPLATE.values()), re.IGNORECASE)
_LETTER = re.compile(r"\w")


def boilerplate_share(caption: str) -> float:
    """The share of the letters and digits of `caption` that belong to boilerplate, in [0, 1]."""
    caption = " ".join(caption[:MAX_CHARACTERS].split())
    total = len(_LETTER.findall(caption))
    rest = len(_LETTER.findall(_ANY.sub(" ", caption)))
    return (total - rest) / total if total else 0.0
