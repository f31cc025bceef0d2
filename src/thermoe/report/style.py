"""The look of the figures: one palette for every arm in every figure, told apart by colour, dash and marker alike.

Colours are those of Okabe and Ito (2008), which people with the common colour-vision deficiencies can tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from thermoe.report.run_data import REFERENCE_ARMS, RunData

#: Width in inches. The page shows a figure 900 pixels wide, so 11 points are read as about 14 pixels.
WIDTH_IN = 8.0
DOTS_PER_INCH = 144


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of one scheme of the page."""

    name: str
    background: str
    ink: str
    quiet: str
    grid: str
    shade: tuple[str, ...]
    arms: tuple[str, ...]
    reference: str
    heat: tuple[str, str, str]

    def rc(self) -> dict[str, Any]:
        """Return the matplotlib settings of the scheme."""
        return {
            "figure.facecolor": self.background,
            "savefig.facecolor": self.background,
            "axes.facecolor": self.background,
            "axes.edgecolor": self.quiet,
            "axes.labelcolor": self.ink,
            "axes.titlecolor": self.ink,
            "axes.titlesize": 11.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": self.grid,
            "grid.linewidth": 0.8,
            "text.color": self.ink,
            "text.parse_math": False,  # a dollar sign in a title is a dollar sign
            "xtick.color": self.quiet,
            "ytick.color": self.quiet,
            "xtick.labelcolor": self.ink,
            "ytick.labelcolor": self.ink,
            "font.size": 11,
            "font.family": "sans-serif",
            "legend.frameon": False,
            "legend.fontsize": 10.5,
            "lines.linewidth": 2.0,
            "lines.solid_capstyle": "round",
        }


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1d2433",
    quiet="#6b7486",
    grid="#e6e9ef",
    shade=("#f4f6fa", "#fdf3e3", "#eef7f1", "#f7eef6"),
    arms=("#1d2433", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b58900", "#56b4e9"),
    reference="#6b7486",
    heat=("#7b4a9e", "#f7f7f7", "#d3720c"),
)
DARK = Theme(
    name="dark",
    background="#171b24",
    ink="#e8ebf2",
    quiet="#9aa4b8",
    grid="#2b3140",
    shade=("#1c212c", "#2a2419", "#18271f", "#281d29"),
    arms=("#e8ebf2", "#ff8a3d", "#56b4e9", "#2fc79a", "#e69fc5", "#f0e442", "#8aa0ff"),
    reference="#9aa4b8",
    heat=("#b48be0", "#20252f", "#ff9d3d"),
)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), "-", (0, (1.5, 1.2)), (0, (5, 1.4, 1.2, 1.4)), "-", (0, (3, 1)))
_MARKERS = ("s", "o", "D", "^", "v", "P", "X")


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How one arm is drawn."""

    color: str
    dash: Any
    marker: str


def arm_style(data: RunData, name: str, theme: Theme) -> ArmStyle:
    """Return the style of an arm: by its place in the run, so that it looks the same in every figure."""
    if name in REFERENCE_ARMS:
        return ArmStyle(theme.reference, ":", "|")
    names = [arm.name for arm in data.arms]
    return line_style(names.index(name) if name in names else len(names), theme)


def line_style(place: int, theme: Theme) -> ArmStyle:
    """Return the style of the line at ``place`` among several."""
    return ArmStyle(theme.arms[place % len(theme.arms)], _DASHES[place % len(_DASHES)], _MARKERS[place % len(_MARKERS)])
