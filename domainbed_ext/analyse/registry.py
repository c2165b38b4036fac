"""All analyses, in the order of the page. An analysis is a module with an `ANALYSIS` that is listed here."""

from typing import Any

from domainbed_ext.analyse import energy, inits, lemmas, similarity
from domainbed_ext.analyse.analysis import Analysis

ANALYSES: dict[str, Analysis[Any]] = {
    module.ANALYSIS.name: module.ANALYSIS for module in (similarity, lemmas, inits, energy)
}
