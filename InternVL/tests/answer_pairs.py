"""Pairs of answers and references for the text metric tests."""

# (answer, reference)
PAIRS = [
    ("The scan shows a mass in the left lobe.", "The scan shows a mass in the left lobe."),
    ("The scan shows a mass in the left lobe", "the CT scan shows a small mass in the right lobe."),
    ("a mass a mass a mass", "A mass is seen. The mass is large."),
    ("Fig-1 is to the left of Fig-2.", "Fig-2 is to the right of Fig-1 and below it."),
    ("One. Two words. Three more words.", "Three more words. One."),
    ("mass", "mass"),
    ("mass", "The mass."),
    ("no", "yes"),
    ("", "yes"),
    ("", ""),
    ("yes", ""),
    ("...", "yes."),
    (" \n ", "yes"),
    ("ein Tumor der Größe 3.5 µm – naïve T‑Zellen", "Ein Tumor der Größe 3.5 µm bei naïven T‑Zellen."),
    ("左肺に 腫瘤が 見える。", "右肺に 腫瘤が 見える。"),
    ("The arrow\npoints\tto  the   aorta", "The arrow points to the aorta."),
]
IDS = [f"{answer[:20]!r}" for answer, _ in PAIRS]
