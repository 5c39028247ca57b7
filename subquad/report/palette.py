"""One colour and one marker for each mechanism of a report, the same in every chart, table and picture.

The eight hues are chosen to stay apart under the common colour-vision deficiencies (after Okabe and Ito, yellow
replaced) and have a light and a dark form; when they are used up they return with another marker. Dense attention is
neutral and dark, the guess without a model grey.
"""

from dataclasses import dataclass

from subquad.records.conventions import DENSE
from subquad.records.queries import mixer_key
from subquad.records.store import Records

HUES = (
    ("#0072b2", "#57aee8"),
    ("#d55e00", "#ff8a4c"),
    ("#008f68", "#2fc79d"),
    ("#b5478a", "#e79ac8"),
    ("#b77f00", "#f0bc42"),
    ("#3b3fa6", "#a3a6ff"),
    ("#8a1f4d", "#d97aa4"),
    ("#5f6f12", "#bccb5a"),
)
NEUTRAL = ("#20242b", "#e9ecf1")
MUTED = ("#7a828e", "#98a1ae")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "hexagon", "star", "cross")
BAND_OPACITY = 0.15
FILL_OPACITY = 0.42


@dataclass(frozen=True)
class Ink:
    """How one mechanism is drawn: the name of its CSS variable, both colours, and plotly's name of its marker."""

    name: str
    light: str
    dark: str
    marker: str

    @property
    def color(self) -> str:
        """The colour as a CSS variable, which the page resolves for the scheme that is shown."""
        return f"var(--{self.name})"

    @property
    def band(self) -> str:
        """The faint form of the colour, for interquartile bands and points that others beat."""
        return f"var(--{self.name}-band)"

    @property
    def fill(self) -> str:
        """The half transparent form of the colour, for bubbles that may overlap."""
        return f"var(--{self.name}-fill)"


DENSE_INK = Ink("ink-dense", *NEUTRAL, "circle")
GUESS_INK = Ink("ink-guess", *MUTED, "line-ew")


def inks(records: Records) -> dict[str, Ink]:
    """Return the ink of each mixer key in `records`; dense attention is neutral, the rest in order of their names."""
    mixers = {(str(r.mixer["name"]), mixer_key(r.mixer)) for r in (*records.runs, *records.profiles)}
    guesses = {run.mixer_name for run in records.runs if run.is_guess}
    fixed = {DENSE: DENSE_INK, **dict.fromkeys(guesses, GUESS_INK)}
    others = [key for name, key in sorted(mixers) if name not in fixed]
    found = {key: fixed[name] for name, key in mixers if name in fixed}
    for index, key in enumerate(others):
        cycle, hue = divmod(index, len(HUES))
        found[key] = Ink(f"ink-{index}", *HUES[hue], MARKERS[(index + cycle) % len(MARKERS)])
    return found


def css(chosen: dict[str, Ink]) -> str:
    """Return the CSS variables of the inks, each for a light and a dark page."""
    lines = []
    for ink in sorted({DENSE_INK, GUESS_INK, *chosen.values()}, key=lambda ink: ink.name):
        lines.append(f"--{ink.name}:light-dark({ink.light},{ink.dark});")
        for form, opacity in (("band", BAND_OPACITY), ("fill", FILL_OPACITY)):
            light, dark = transparent(ink.light, opacity), transparent(ink.dark, opacity)
            lines.append(f"--{ink.name}-{form}:light-dark({light},{dark});")
    return ":root{" + "".join(lines) + "}"


def transparent(color: str, opacity: float) -> str:
    """Return the colour "#rrggbb" with an opacity in 0..1, as CSS."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
