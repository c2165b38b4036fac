"""Plots as elements of an HTML page, in its colours, light or dark, and in its fonts."""

import re

from markupsafe import Markup
from matplotlib.figure import Figure

from domainbed_ext.report.plots import plots

# Colours of plots, and the variables of the page that replace them, as it is light or dark.
_THEMED = {
    "#000000": "var(--ink)",
    "#ffffff": "var(--paper)",
    "#e6e6e6": "var(--rule)",
    "#9a9a9a": "var(--faint)",
    "#6e6e6e": "var(--muted)",
    "#0072b2": "var(--blue)",  # the two of the palette that are dim on a dark ground
    "#7a7a7a": "var(--grey)",
}


def themed(colour: str) -> str:
    """A colour of plots as the page has it, light or dark.

    Args:
        colour: Colour as "#RRGGBB".
    """
    return _THEMED.get(colour.lower(), colour)


def inline_svg(figure: Figure, prefix: str, label: str) -> Markup:
    """Renders a figure as an element of an HTML page, in the page's colours and fonts.

    Args:
        figure: Figure to draw.
        prefix: Prefix of its ids, which would otherwise be those of every other figure too.
        label: Description for screen readers.

    Returns:
        SVG element.
    """
    text = plots.render(figure, "svg").decode("utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(rf"(?:{'|'.join(_THEMED)})\b", lambda match: _THEMED[match[0]], text)
    text = re.sub(r"font: ([^;\"]*?[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", text)
    width = re.search(r'width="([\d.]+)pt"', text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    opening = Markup('<svg role="img" aria-label="{}" style="max-width: {}px"').format(
        label, round(float(width[1]) * 4 / 3) if width else 800
    )
    # matplotlib has escaped what it wrote, and the label is escaped above.
    return Markup(str(opening) + text[len("<svg") :])
